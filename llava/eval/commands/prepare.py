"""`python -m llava.eval prepare TASK`: get a benchmark's data into LLaVA's layout, and check them.

Files come from public datasets (llava[data]), or with --from out of an archive or folder that was
downloaded. What is there already stays: an interrupted preparation goes on where it stopped.
"""

import argparse
from pathlib import Path

from llava.eval.data.archives import open_store, take_files, take_images
from llava.eval.data.check import check, open_prepared
from llava.eval.data.hub import Reader
from llava.eval.data.layout import Layout
from llava.eval.tasks.base import Benchmark, Sources, TaskError, list_prepared


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `prepare` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser(
        "prepare", help="get the data of a benchmark into LLaVA's layout, or check them"
    )
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help=f"one of {', '.join(list_prepared())}; --check alone: all",
    )
    parser.add_argument("--protocol", help="of the task; by default its first one")
    parser.add_argument("--data-root", type=Path, default=Benchmark.default_root, metavar="FOLDER")
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
    """Prepare the tasks; return 0 if all are complete, with --check 1 if one is not.

    Raises:
        TaskError: data are still missing at the end; the message says which, and what gets them.
    """
    if not args.tasks and not args.check:
        raise TaskError(f"give a task to prepare: {', '.join(list_prepared())}")
    if len(args.tasks) > 1 and (args.source or args.protocol or args.dataset):
        raise TaskError("--from, --protocol and --dataset are for one task; give one")
    complete = True
    for task in args.tasks or list_prepared():
        report = check(task, args.protocol, args.data_root)
        if report.problem and not args.check:
            prepare(task, args)
            report = check(task, args.protocol, args.data_root)
        if report.problem and not args.check:
            raise TaskError(
                f"{task} is not complete: {report.problem}; {_how_to_complete(task, args)}"
            )
        if report.problem:
            complete = False
            print(f"{task}: not complete: {report.problem}; {_how_to_complete(task, args)}")
        else:
            print(f"{task}: ready: {report.questions:,} questions, {report.images:,} images")
    return 0 if complete else 1


def prepare(task: str, args: argparse.Namespace) -> None:
    """Do what can be done towards a complete benchmark.

    Raises:
        TaskError: nothing can be done.
    """
    _, sources = open_prepared(task, args.protocol, args.data_root)
    if args.source is not None and _take(task, sources, args):
        return
    if args.source is not None and not (
        args.source.is_dir() and any(args.source.rglob("*.parquet"))
    ):
        raise TaskError(
            f"{args.source} has nothing that {task} still needs; {_how_to_complete(task, args)}"
        )
    if sources.build is None:
        raise TaskError(
            f"{task} cannot be made from a public dataset: {_how_to_take(task, sources)}"
        )
    sources.build(Reader(task, args.source, args.dataset), Layout(args.data_root))


def _take(task: str, sources: Sources, args: argparse.Namespace) -> int:
    """Put originals in place: files first, then the images that these name. Return how many."""
    layout = Layout(args.data_root)
    with open_store(args.source) as store:
        count = take_files(store, sources.files, sources.tree, layout)
        missing = check(task, args.protocol, args.data_root).missing
        if sources.images is not None:
            count += take_images(store, sources.images, missing, layout)
    return count


def _how_to_complete(task: str, args: argparse.Namespace) -> str:
    _, sources = open_prepared(task, args.protocol, args.data_root)
    protocol = f" --protocol {args.protocol}" if args.protocol else ""
    if sources.build is None or sources.images_only or not args.check:
        return _how_to_take(task, sources, protocol)
    return f"`python -m llava.eval prepare {task}{protocol}` gets it"


def _how_to_take(task: str, sources: Sources, protocol: str = "") -> str:
    return (
        f"download {sources.originals}, and run `python -m llava.eval prepare {task}{protocol} "
        "--from PATH` for each"
    )
