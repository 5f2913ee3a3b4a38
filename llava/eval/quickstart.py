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
from tqdm import tqdm

from llava.command_line import check_complete
from llava.conversation import conv_mode_for
from llava.eval import provenance
from llava.eval.arms import UNPRUNED, Arm, plan_arms
from llava.eval.metrics import accuracy_rows, timing_columns
from llava.eval.overlays import save_overlays
from llava.eval.plots import plot_accuracy
from llava.eval.results import (
    SCHEMA_VERSION,
    Record,
    RunFolder,
    dump_json,
    exclusive,
    write_atomically,
)
from llava.eval.runner import Runner, Subject
from llava.eval.tables import render
from llava.eval.tasks.question_file import Task, load_task
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningError, get_method, list_methods
from llava.utils import UserInputError

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
    add("--model-path", type=Path, default=Path("playground/llava-tiny"))
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
    """Answer, tabulate, draw; returns the exit code."""
    started = time.monotonic()
    if ALL in args.methods:
        args.methods = every_method()
    check(args)
    benchmark = args.benchmark or args.model_path / "benchmark"
    task = load_task(benchmark, args.limit, args.image_folder)
    subject = load_subject(args.model_path, args.device)
    identity = describe(args, subject, task)
    runner = Runner(
        subject,
        task,
        batch_size=args.batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=args.seed,
        run_key=identity["run_key"],
    )
    arms = plan(runner, args.methods, args.budgets)
    with exclusive(args.output):
        result = answer_all(args, runner, arms, identity, started)
    print(f"\n{render(result)}")
    print(f"written to {args.output}: {', '.join((*FILES, *PICTURES))}")
    if args.save_result:
        write_atomically(args.save_result, dump_json(result))
        print(f"result file: {args.save_result}")
    return 0


def describe(args: argparse.Namespace, subject: Subject, task: Task) -> dict[str, Any]:
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
        "checkpoint_sha256": provenance.hash_checkpoint(args.model_path),
        "data_sha256": task.data_hash,
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
    if not args.model_path.is_dir():
        raise UserInputError(f"--model-path {args.model_path} is no folder")
    try:
        for method in args.methods:
            get_method(method)
    except PruningError as error:
        raise UserInputError(str(error)) from error


def load_subject(path: Path, device: str) -> Subject:
    """The checkpoint with its prompt template, pruning switched off."""
    name = get_model_name_from_path(str(path))
    tokenizer, model, processor, _ = load_pretrained_model(str(path), None, name, device=device)
    check_complete(path, tokenizer, processor)
    model.pruning = None
    return Subject(model.eval(), tokenizer, processor, conv_mode_for(name, model.config))


def every_method() -> list[str]:
    """All registered methods of this stage: those of a plain run, then the others by name."""
    stage = [name for name in list_methods() if get_method(name).stage == "pre_llm"]
    return [*METHODS, *(name for name in stage if name not in METHODS)]


def plan(runner: Runner, methods: Sequence[str], budgets: Sequence[int]) -> tuple[Arm, ...]:
    """All arms; what a method refuses to do with the first image is known to be unavailable.

    So is a method that needs what the model's vision tower does not have.
    """
    image = [runner.task.questions[0].image]
    lacking = {method: runner.lacking(image, method) for method in methods}
    first = runner.encode(image, [method for method in methods if lacking[method] is None])
    return plan_arms(
        methods,
        budgets,
        tokens=first.embeddings(0).shape[0],
        impossible=lambda method, budget: (
            lacking.get(method) or runner.refusal(first, method, budget)
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
    folder = RunFolder(
        args.output / "runs" / identity["run_key"][:16],
        [running * len(batch) for batch in runner.batches],
    )
    reused = folder.done
    info = identity | {
        "schema_version": SCHEMA_VERSION,
        "command": args.command_line,
        "git": provenance.git_state(),
        "machine": provenance.machine(str(runner.subject.model.device)),
        "batches": len(runner.batches),
        "reused_batches": reused,
        "status": "running",
    }
    folder.write_json("run.json", info)
    print(f"{len(arms)} arms, {len(runner.task.questions)} questions; {folder.path}")
    if reused:
        print(f"reusing {reused} of {len(runner.batches)} batches answered before")
    try:
        ask(runner, arms, folder)
        info["status"] = "done"
    finally:
        info["status"] = "interrupted" if info["status"] == "running" else info["status"]
        info["wall_seconds"] = round(time.monotonic() - started, 1)
        folder.write_json("run.json", info)
    return conclude(args.output, runner, arms, folder, info)


def ask(runner: Runner, arms: Sequence[Arm], folder: RunFolder) -> None:
    """Answer the batches that are missing, under a progress bar with the unpruned accuracy."""
    done = sum(len(batch) for batch in runner.batches[: folder.done])
    total = len(runner.task.questions)
    scores = [line["correct"] for line in folder.answers if line["arm"] == UNPRUNED]
    with (
        tqdm(total=total, initial=done, unit="question", dynamic_ncols=True) as bar,
        closing(runner.run(arms, folder.done)) as batches,
    ):
        for answers, timings in batches:
            folder.append(answers, timings)
            fresh = [line["correct"] for line in answers if line["arm"] == UNPRUNED]
            scores += fresh
            bar.set_postfix_str(f"unpruned {100 * sum(scores) / len(scores):.1f} %", refresh=False)
            bar.update(len(fresh))


def conclude(
    output: Path, runner: Runner, arms: Sequence[Arm], folder: RunFolder, info: Record
) -> Record:
    """Compute metrics, table and pictures from the logs and copy everything to `output`."""
    rows = accuracy_rows(arms, folder.answers)
    folder.write_json("metrics.json", {"run_key": info["run_key"], "rows": rows})
    times = timing_columns(arms, folder.timings)
    result = make_result(runner.task, [row | times[row["arm"]] for row in rows], info)
    write_atomically(folder.path / "table.md", render(result))
    plot_accuracy(result, folder.path / PICTURES[0])
    save_overlays(runner, arms, OVERLAY_TOKENS, folder.path / PICTURES[1])
    for name in (*FILES, *PICTURES):
        shutil.copyfile(folder.path / name, output / name)
    return result


def make_result(task: Task, rows: Sequence[Record], info: Record) -> Record:
    """The compact result: what tables, plots and the README are rendered from."""
    run = {key: value for key, value in info.items() if key not in ("config", "schema_version")}
    return {
        "schema_version": SCHEMA_VERSION,
        "questions": len(task.questions),
        "images": len({question.image for question in task.questions}),
        "config": info["config"],
        "run": run,
        "rows": list(rows),
    }
