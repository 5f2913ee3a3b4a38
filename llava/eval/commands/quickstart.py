"""`llava quickstart`: what pruning costs and saves, on the model in the repository.

Every method at every budget answers the same questions, next to the unpruned model and three
controls. All numbers come out of this run; a run that was interrupted goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from llava.command_line import natural, positive
from llava.eval.engine.metrics import result_rows
from llava.eval.engine.request import JOIN, UNPRUNED, Arm, RunRequest, parse_arm
from llava.eval.engine.run import Answered, mark_unavailable
from llava.eval.engine.run import run as run_request
from llava.eval.engine.runner import Runner
from llava.eval.engine.schema import SCHEMA_VERSION, Record
from llava.eval.report.pictures import save_overlays
from llava.eval.report.plots import draw_accuracy
from llava.eval.report.result import render
from llava.eval.tasks.question_file import QuestionFile
from llava.families.spec import ModelSpec
from llava.model.checkpoint import local_checkpoint
from llava.pruning import get_method, list_methods
from llava.sampling import Sampling
from llava.shipped import LLAVA_TINY
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError, user_path

METHODS = ("none", "random", "grid", "pool", "norm", "divprune", "zoo", "zoo-exact")
BUDGETS = (576, 192, 128, 64, 32)
CONTROL = "least-sensitive"
ALL = "all"
DEFAULT_LIMIT = 240  # questions: about five minutes on two CPU cores with llava-tiny
MAX_NEW_TOKENS = 8
OVERLAY_TOKENS = 64
TABLE = "table.md"
PICTURES = ("accuracy_vs_tokens.png", "overlays.png")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `quickstart` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("quickstart", help="compare all methods on llava-tiny")
    add = parser.add_argument
    add("--model-path", default=LLAVA_TINY, help="checkpoint folder or name")
    add("--benchmark", type=Path, help="folder of questions.jsonl; default: MODEL_PATH/benchmark")
    add("--image-folder", type=Path, help="read images from here instead of rendering them")
    add("--limit", type=natural, default=DEFAULT_LIMIT, help="questions to ask, 0 for all")
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"registered names; {ALL!r} for every method that prunes before the language model; "
        "zoo@192+fastv for one behind another, the budgets being those of the second",
    )
    add("--budgets", nargs="+", type=positive, default=list(BUDGETS), metavar="TOKENS")
    add("--output", type=Path, default=Path("outputs/quickstart"))
    add("--save-result", type=Path, metavar="PATH", help="also write one compact result JSON")
    add("--batch-size", type=positive, default=8, help="questions per batch")
    add("--seed", type=natural, default=0, help="of the methods that draw at random")
    add("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer, tabulate, draw; 1 if some images could not be read."""
    if ALL in args.methods:
        others = [method for method in args.methods if method != ALL]
        args.methods = list(dict.fromkeys([*every_method(), *others]))
    check(args)

    def report(done: Answered) -> None:
        result = make_result(args, done)
        folder = done.folder.path
        write_atomically(folder / TABLE, render(result))
        draw_accuracy(result).savefig(folder / PICTURES[0])
        save_overlays(done.runner, done.arms, OVERLAY_TOKENS, folder / PICTURES[1])
        if args.save_result:
            write_atomically(args.save_result, dump_json(result))
            print(f"result file: {args.save_result}")
        print(f"\n{render(result)}")

    return run_request(
        request_from(args), choose_arms=choose_arms, report=report, more_files=(TABLE, *PICTURES)
    )


def check(args: argparse.Namespace) -> None:
    """Refuse unusable flags before anything slow starts.

    Raises:
        UserInputError: naming the flag.
    """
    if find_spec("matplotlib") is None:
        raise UserInputError("the plots need matplotlib: pip install 'llava[eval]'")
    if user_path(args.model_path).is_file():
        raise UserInputError(
            f"--model-path {args.model_path} is not a folder; give a checkpoint folder or a hub "
            "name"
        )


def request_from(args: argparse.Namespace) -> RunRequest:
    """Read the flags of `quickstart`.

    Raises:
        UserInputError: an unknown method, or a model or data that are not here.
    """
    arms = plan_arms(args.methods, args.budgets)
    folder = local_checkpoint(args.model_path)
    model = ModelSpec(str(folder), device=args.device)
    benchmark = QuestionFile(args.benchmark or folder / "benchmark", image_folder=args.image_folder)
    return RunRequest(
        benchmark=benchmark,
        model=model.asked_in(model.own_template),
        arms=arms,
        sampling=Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS),
        output=args.output,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        workers=0,
        command=args.command_line,
    )


def every_method() -> list[str]:
    """List all registered methods of this stage: those of a plain run, then the others by name."""
    stage = [name for name in list_methods() if get_method(name).stage == "pre_llm"]
    return [*METHODS, *(name for name in stage if name not in METHODS)]


def plan_arms(methods: Sequence[str], budgets: Sequence[int]) -> tuple[Arm, ...]:
    """Plan the unpruned arm, every method at every budget, then the controls.

    Raises:
        PruningError: an unknown method.
        UserInputError: an option or a budget in the place of a name.
    """
    for method in methods:
        if ":" in method or "@" in method.rpartition(JOIN)[2]:
            raise UserInputError(
                f"--methods takes names, and a budget only in front of a {JOIN} as in "
                f"zoo@192{JOIN}fastv, not {method!r}; `llava run --arm METHOD:OPTION=VALUE@BUDGET` "
                "sets options"
            )
    # The unpruned arm and the control are in every plan already.
    named = [method for method in dict.fromkeys(methods) if method not in (UNPRUNED, CONTROL)]
    arms = [Arm(UNPRUNED, label="none (unpruned)")]
    for method in (*named, CONTROL):
        for budget in sorted(set(budgets), reverse=True):
            arm = replace(parse_arm(f"{method}@{budget}"), label=method)
            arms.append(replace(arm, control="tokens") if method == CONTROL else arm)
    arms.append(Arm("shuffled-image", label="shuffled image", image="other", control="image"))
    arms.append(Arm("no-image", label="no image", image="absent", control="image"))
    return tuple(arms)


def choose_arms(runner: Runner, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Fit the arms to the model, by its first image that can be read.

    A budget that is not below the tokens of an unpruned image changes nothing and is the unpruned
    arm already. What a method refuses to do is marked unavailable, never replaced by a
    neighbouring budget. Labels say what a method cannot read of this model.

    Raises:
        UserInputError: no image can be read.
    """
    images = runner.first_image()
    if images is None:
        names = runner.plan.images()
        (reason,) = runner.source.load(names[:1]).failed.values()
        raise UserInputError(f"none of the {len(names)} images can be read; the first: {reason}")
    tokens = len(runner.encode(images).embeddings(0))
    smaller = [arm for arm in arms if arm.budget is None or arm.budget < tokens]
    chosen = []
    for arm in mark_unavailable(runner, smaller):
        if arm.pruning is not None:
            with suppress(UserInputError):  # what the model lacks is in `unavailable` already
                label = runner.label(runner.encode(images, [arm]), arm)
                if arm.decoder is not None:  # `arm` is called by both methods already
                    label = arm.label + label.removeprefix(arm.pruning.method)
                arm = replace(arm, label=label)
        if arm.image == "other" and runner.plan.stand_ins is None:
            arm = replace(arm, unavailable="needs questions about two images")
        chosen.append(arm)
    return tuple(chosen)


def make_result(args: argparse.Namespace, done: Answered) -> Record:
    """Make the compact result, see `schema.Result`, from which tables and plots are made."""
    flags = {"methods": args.methods, "budgets": args.budgets, "limit": args.limit}
    left_out = ("config", "schema_version", "arms")
    return {
        "schema_version": SCHEMA_VERSION,
        "questions": len(done.plan.items),
        "images": len(done.plan.images()),
        "config": done.info["config"] | flags,
        "run": {key: value for key, value in done.info.items() if key not in left_out},
        "rows": result_rows(done.arms, done.answers, done.timings),
    }
