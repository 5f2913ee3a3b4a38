"""Check whether the data of a benchmark are complete."""

from dataclasses import dataclass
from pathlib import Path

from llava.eval.tasks.base import (
    Benchmark,
    Item,
    Sources,
    TaskError,
    get_benchmark,
)


@dataclass(frozen=True)
class Report:
    """What there is: `questions`, `images` that must exist, names of the `missing` ones.

    `problem` says in a few words what is wrong first; None if nothing is.
    """

    questions: int
    images: int
    missing: tuple[str, ...]
    problem: str | None


def open_prepared(task: str, protocol: str | None, root: Path) -> tuple[Benchmark, Sources]:
    """Return a benchmark and where its data come from.

    Raises:
        TaskError: the names are unknown.
    """
    benchmark = get_benchmark(task)(root, protocol)
    sources = benchmark.sources()
    if sources is None:
        raise TaskError(
            f"{task} does not say where its data come from, so there is nothing to prepare; "
            "docs/benchmarks.md has the files that it reads"
        )
    return benchmark, sources


def check(task: str, protocol: str | None, root: Path) -> Report:
    """Read the benchmark as a run would, count its questions, look for its images."""
    benchmark, sources = open_prepared(task, protocol, root)
    try:
        items = benchmark.items()
    except TaskError as error:
        return Report(0, 0, (), str(error).partition("; `python -m llava.eval prepare")[0])
    names = tuple(dict.fromkeys(name for item in items for name in item.images))
    folder, problem = sources.images, _miscount(items, sources)
    if folder is None:  # images are in a file that has been read
        return Report(len(items), len(names), (), problem)
    missing = tuple(name for name in names if not (folder / name).is_file())
    if problem is None and missing:
        problem = (
            f"{len(missing):,} of {len(names):,} images are missing in {folder} ({missing[0]})"
        )
    return Report(len(items), len(names), missing, problem)


def _miscount(items: list[Item], sources: Sources) -> str | None:
    if sources.count is not None and len(items) != sources.count:
        return f"there are {len(items):,} questions, published are {sources.count:,}"
    pictured = sum(bool(item.images) for item in items)
    if sources.with_image is not None and pictured != sources.with_image:
        return f"{pictured:,} questions have an image, of the published ones {sources.with_image:,}"
    return None
