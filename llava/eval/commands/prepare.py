"""`python -m llava.eval prepare TASK`: get a benchmark's data into LLaVA's layout, and check them.

Files come from public datasets (llava[data]), or with --from out of an archive or folder that was
downloaded. What is there already stays: an interrupted preparation goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from llava.eval.data.archives import open_store, take_files, take_images
from llava.eval.data.check import check, plan_of
from llava.eval.data.hub import Reader
from llava.eval.data.layout import Layout
from llava.eval.preparation.plans import PLANS, Plan
from llava.eval.tasks.base import TaskError

DATA_ROOT = Path("playground/data/eval")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `prepare` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser(
        "prepare", help="get the data of a benchmark into LLaVA's layout, or check them"
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"one of {', '.join(PLANS)}; --check alone: all"
    )
    parser.add_argument("--protocol", help="of the task; by default its first one")
    parser.add_argument("--data-root", type=Path, default=DATA_ROOT, metavar="FOLDER")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="downloaded originals: a folder, .zip or .tar; or a folder of a dataset's parquet "
        "files. Repeat the command for each of several archives",
    )
    parser.add_argument("--dataset", metavar="ID", help="another dataset of the same schema")
    parser.add_argument("--check", action="store_true", help="only say what is there and missing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the tasks; 0 if all are complete, with --check 1 if one is not.

    Raises:
        TaskError: data are still missing at the end; the message says which, and what gets them.
    """
    if not args.tasks and not args.check:
        raise TaskError(f"give a task to prepare: {', '.join(PLANS)}")
    if len(args.tasks) > 1 and (args.source or args.protocol or args.dataset):
        raise TaskError("--from, --protocol and --dataset are for one task; give one")
    complete = True
    for task in args.tasks or PLANS:
        report = check(task, args.protocol, args.data_root)
        if report.problem and not args.check:
            prepare(task, args)
            report = check(task, args.protocol, args.data_root)
        if report.problem and not args.check:
            raise TaskError(f"{task} is not complete: {report.problem}; {_mend(task, args)}")
        if report.problem:
            complete = False
            print(f"{task}: not complete: {report.problem}; {_mend(task, args)}")
        else:
            print(f"{task}: ready: {report.questions:,} questions, {report.images:,} images")
    return 0 if complete else 1


def prepare(task: str, args: argparse.Namespace) -> None:
    """Do what can be done towards a complete benchmark. Raises TaskError where it is nothing."""
    _, plan = plan_of(task, args.protocol)
    layout = Layout(args.data_root)
    if args.source is None:
        _build(task, plan, args.dataset, None, layout)
    elif not _take(task, plan, args, layout):
        if not (args.source.is_dir() and any(args.source.rglob("*.parquet"))):
            raise TaskError(
                f"{args.source} holds nothing that {task} still needs; {_mend(task, args)}"
            )
        _build(task, plan, args.dataset, args.source, layout)


def _take(task: str, plan: Plan, args: argparse.Namespace, layout: Layout) -> int:
    """Put originals in place: files first, then the images that these name. Returns how many."""
    with open_store(args.source) as store:
        count = take_files(store, plan.files, plan.tree, layout)
        missing = check(task, args.protocol, args.data_root).missing
        if plan.images is not None:
            count += take_images(store, plan.images, missing, layout)
    return count


def _build(task: str, plan: Plan, dataset: str | None, folder: Path | None, layout: Layout) -> None:
    if plan.build is None:
        raise TaskError(f"{task} cannot be made from a public dataset: {_originals(task, plan)}")
    datasets = [replace(one, name=dataset or one.name) for one in plan.datasets]
    plan.build(Reader(task, folder), datasets, layout)


def _mend(task: str, args: argparse.Namespace) -> str:
    _, plan = plan_of(task, args.protocol)
    protocol = f" --protocol {args.protocol}" if args.protocol else ""
    if plan.build is None or plan.images_only or not args.check:
        return _originals(task, plan, protocol)
    return f"`python -m llava.eval prepare {task}{protocol}` gets it"


def _originals(task: str, plan: Plan, protocol: str = "") -> str:
    return (
        f"download {plan.originals}, and run `python -m llava.eval prepare {task}{protocol} "
        "--from PATH` for each"
    )
