"""Whether the data of a benchmark are complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.eval.preparation.plans import PLANS, Plan
from llava.eval.tasks.base import Benchmark, Item, TaskError, get_benchmark


@dataclass(frozen=True)
class Report:
    """What there is: `questions`, `images` that must exist, names of the `missing` ones.

    `problem` says in a few words what is wrong first; None if nothing is.
    """

    questions: int
    images: int
    missing: tuple[str, ...]
    problem: str | None


def plan_of(task: str, protocol: str | None) -> tuple[type[Benchmark], Plan]:
    """The benchmark's class by name, and its plan. Raises TaskError for unknown names."""
    cls = get_benchmark(task)
    protocol = protocol or next(iter(cls.protocols))
    if protocol not in cls.protocols:
        raise TaskError(f"{task} has no protocol {protocol!r}; one of {', '.join(cls.protocols)}")
    if protocol not in PLANS.get(task, {}):
        raise TaskError(f"{task} needs no preparation, or brings its own; see its documentation")
    return cls, PLANS[task][protocol]


def check(task: str, protocol: str | None, root: Path) -> Report:
    """Read the benchmark as a run would, count its questions, look for its images."""
    cls, plan = plan_of(task, protocol)
    try:
        items = cls(root, protocol).items()
    except TaskError as error:
        return Report(0, 0, (), str(error).partition("; `python -m llava.eval prepare")[0])
    names = tuple(dict.fromkeys(name for item in items for name in item.images))
    if plan.images is None:  # in a file that has been read
        return Report(len(items), len(names), (), _miscount(items, plan))
    folder = root / plan.images
    missing = tuple(name for name in names if not (folder / name).is_file())
    problem = _miscount(items, plan)
    if problem is None and missing:
        problem = (
            f"{len(missing):,} of {len(names):,} images are missing in {folder} ({missing[0]})"
        )
    return Report(len(items), len(names), missing, problem)


def _miscount(items: list[Item], plan: Plan) -> str | None:
    if plan.count is not None and len(items) != plan.count:
        return f"there are {len(items):,} questions, published are {plan.count:,}"
    shown = sum(bool(item.images) for item in items)
    if plan.with_image is not None and shown != plan.with_image:
        return f"{shown:,} questions have an image, of the published ones {plan.with_image:,}"
    return None
