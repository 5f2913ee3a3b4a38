"""`python -m llava.eval quickstart`: what pruning costs and saves, on the model in the repository.

Every method at every budget answers the same questions, next to the unpruned model and three
controls. All numbers come out of this run; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava.eval import provenance
from llava.eval.arms import Arm, plan_arms
from llava.eval.identity import checkpoint_hash
from llava.eval.metrics import accuracy_rows, timing_columns
from llava.eval.overlays import save_overlays
from llava.eval.plan import Plan
from llava.eval.plots import plot_accuracy
from llava.eval.progress import answer_batches
from llava.eval.records import failed_items
from llava.eval.results import SCHEMA_VERSION, Record, RunFolder
from llava.eval.runner import Runner
from llava.eval.tables import render
from llava.eval.tasks.question_file import QuestionFile
from llava.model.checkpoint import local_checkpoint
from llava.model.loaded import LoadedModel, load_model
from llava.pruning import PruningError, get_method, list_methods
from llava.sampling import Sampling
from llava.shipped import LLAVA_TINY
from llava.storage import dump_json, exclusive, write_atomically
from llava.utils import UserInputError, user_path

METHODS = ("none", "random", "grid", "pool", "norm", "divprune", "zoo", "zoo-exact")
BUDGETS = (576, 192, 128, 64, 32)
ALL = "all"
DEFAULT_LIMIT = 240  # questions: about five minutes on two CPU cores with llava-tiny
MAX_NEW_TOKENS = 8
OVERLAY_TOKENS = 64
FILES = ("answers.jsonl", "timings.jsonl", "metrics.json", "run.json", "table.md")
PICTURES = ("accuracy_vs_tokens.png", "overlays.png")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `quickstart` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("quickstart", help="compare all methods on llava-tiny")
    add = parser.add_argument
    add("--model-path", default=LLAVA_TINY, help="checkpoint folder or name")
    add("--benchmark", type=Path, help="folder of questions.jsonl; default: MODEL_PATH/benchmark")
    add("--image-folder", type=Path, help="read images from here instead of rendering them")
    add("--limit", type=int, default=DEFAULT_LIMIT, help="questions to ask, 0 for all")
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"registered names, or {ALL!r} for every method that prunes before the language model",
    )
    add("--budgets", nargs="+", type=int, default=list(BUDGETS), metavar="TOKENS")
    add("--output", type=Path, default=Path("outputs/quickstart"))
    add("--save-result", type=Path, metavar="PATH", help="also write one compact result JSON")
    add("--batch-size", type=int, default=8, help="questions per batch")
    add("--seed", type=int, default=0, help="of the methods that draw at random")
    add("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer, tabulate, draw; 1 if some images could not be read."""
    started = time.monotonic()
    if ALL in args.methods:
        args.methods = every_method()
    check(args)
    args.model_path = local_checkpoint(args.model_path)
    root = args.benchmark or args.model_path / "benchmark"
    benchmark = QuestionFile(root, image_folder=args.image_folder)
    questions = Plan.of(benchmark.items()[: args.limit or None], args.batch_size)
    subject = load_model(str(args.model_path), args.device)
    identity = describe(args, subject, benchmark)
    runner = Runner(
        subject,
        benchmark,
        questions,
        sampling=Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS),
        seed=args.seed,
        run_key=identity["run_key"],
    )
    arms = choose_arms(runner, args.methods, args.budgets)
    with exclusive(args.output):
        result = answer_all(args, runner, arms, identity, started)
    print(f"\n{render(result)}")
    print(f"written to {args.output}: {', '.join((*FILES, *PICTURES))}")
    if args.save_result:
        write_atomically(args.save_result, dump_json(result))
        print(f"result file: {args.save_result}")
    return 1 if result["run"]["failed_items"] else 0


def describe(
    args: argparse.Namespace, subject: LoadedModel, benchmark: QuestionFile
) -> dict[str, Any]:
    """Everything that decides an answer, and its hash: the run key."""
    identity = {
        "config": {
            "command": "quickstart",
            "methods": args.methods,
            "budgets": args.budgets,
            "limit": args.limit,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "device": str(subject.model.device),
            "dtype": str(subject.model.dtype),
            "threads": torch.get_num_threads(),
            "template": subject.template,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        "checkpoint_sha256": checkpoint_hash(str(args.model_path)),
        "data_sha256": benchmark.data_hash(),
        "source_sha256": provenance.hash_sources(),
        "versions": provenance.package_versions(),
    }
    return {"run_key": provenance.hash_json(identity), **identity}


def check(args: argparse.Namespace) -> None:
    """Refuse unusable flags before anything slow starts."""
    if args.limit < 0 or args.batch_size < 1 or args.seed < 0:
        raise UserInputError("--limit and --seed must be at least 0, --batch-size at least 1")
    if any(budget < 1 for budget in args.budgets):
        raise UserInputError("--budgets must be at least 1")
    if find_spec("matplotlib") is None:
        raise UserInputError("the plots need matplotlib: pip install 'llava[eval]'")
    if user_path(args.model_path).is_file():
        raise UserInputError(
            f"--model-path {args.model_path} is no folder; give a checkpoint folder or a hub name"
        )
    try:
        for method in args.methods:
            get_method(method)
    except PruningError as error:
        raise UserInputError(str(error)) from error


def every_method() -> list[str]:
    """All registered methods of this stage: those of a plain run, then the others by name."""
    stage = [name for name in list_methods() if get_method(name).stage == "pre_llm"]
    return [*METHODS, *(name for name in stage if name not in METHODS)]


def choose_arms(runner: Runner, methods: Sequence[str], budgets: Sequence[int]) -> tuple[Arm, ...]:
    """All arms; what a method refuses to do with the first image is known to be unavailable.

    So is a method that needs what the model's vision tower does not have.

    Raises UserInputError if no image can be read.
    """
    readable = runner.first_image()
    if readable is None:
        names = runner.plan.images()
        (reason,) = runner.source.load(names[:1]).failed.values()
        raise UserInputError(f"none of the {len(names)} images can be read; the first: {reason}")
    lacking = {method: runner.lacking(readable, method) for method in methods}
    first = runner.encode(readable, [method for method in methods if lacking[method] is None])
    return plan_arms(
        methods,
        budgets,
        tokens=first.embeddings(0).shape[0],
        impossible=lambda method, budget: (
            lacking.get(method) or runner.refusal(first, Arm("", "", method, budget))
        ),
        one_image=runner.stand_ins is None,
        label=lambda method: runner.label(first, method),
    )


def answer_all(
    args: argparse.Namespace,
    runner: Runner,
    arms: Sequence[Arm],
    identity: dict[str, Any],
    started: float,
) -> Record:
    """Run what is left of the plan, write all files, publish them to the output folder."""
    running = sum(arm.unavailable is None for arm in arms)
    path = args.output / "runs" / identity["run_key"][:16]
    sizes = [running * len(batch) for batch in runner.plan.batches]
    with closing(RunFolder(path, sizes)) as folder:
        return answer_rest(args, runner, arms, folder, identity, started)


def answer_rest(
    args: argparse.Namespace,
    runner: Runner,
    arms: Sequence[Arm],
    folder: RunFolder,
    identity: dict[str, Any],
    started: float,
) -> Record:
    """Answer the batches that the folder lacks, under a description of the run."""
    numbers = folder.remaining()
    batches = len(runner.plan.batches)
    reused = batches - len(numbers)
    info = identity | {
        "schema_version": SCHEMA_VERSION,
        "command": args.command_line,
        "git": provenance.git_state(),
        "machine": provenance.machine(str(runner.subject.model.device)),
        "batches": batches,
        "reused_batches": reused,
        "status": "running",
    }
    folder.write_json("run.json", info)
    print(f"{len(arms)} arms, {len(runner.plan.items)} questions; {folder.path}")
    if reused:
        print(f"reusing {reused} of {batches} batches answered before")
    try:
        answer_batches(runner, arms, folder, numbers)
        info["status"] = "done"
    finally:
        info["status"] = "interrupted" if info["status"] == "running" else info["status"]
        info["wall_seconds"] = round(time.monotonic() - started, 1)
        folder.write_json("run.json", info)
    return conclude(args.output, runner, arms, folder, info)


def conclude(
    output: Path, runner: Runner, arms: Sequence[Arm], folder: RunFolder, info: Record
) -> Record:
    """Compute metrics, table and pictures from the logs and copy everything to `output`."""
    answers, timings = folder.read()
    failed = failed_items(answers)
    info["failed_items"] = failed
    folder.write_json("run.json", info)
    folder.write_lines("answers.jsonl", answers)
    folder.write_lines("timings.jsonl", timings)
    rows = accuracy_rows(arms, answers)
    folder.write_json("metrics.json", {"run_key": info["run_key"], "rows": rows})
    times = timing_columns(arms, timings)
    result = make_result(runner.plan, [row | times[row["arm"]] for row in rows], info)
    write_atomically(folder.path / "table.md", render(result))
    plot_accuracy(result, folder.path / PICTURES[0])
    save_overlays(runner, arms, OVERLAY_TOKENS, folder.path / PICTURES[1])
    for name in (*FILES, *PICTURES):
        shutil.copyfile(folder.path / name, output / name)
    return result


def make_result(plan: Plan, rows: Sequence[Record], info: Record) -> Record:
    """The compact result: what tables, plots and the README are rendered from."""
    run = {key: value for key, value in info.items() if key not in ("config", "schema_version")}
    return {
        "schema_version": SCHEMA_VERSION,
        "questions": len(plan.items),
        "images": len(plan.images()),
        "config": info["config"],
        "run": run,
        "rows": list(rows),
    }
