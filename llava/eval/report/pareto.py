"""Accuracy against cost, with the settings that no other setting beats on both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.tables.fill import Filled, FilledRow


@dataclass(frozen=True)
class Point:
    """One row in a plot: `cost` is better when lower, `quality` when higher."""

    label: str
    cost: float
    quality: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats on one axis without losing on the other, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def quality_of(filled: Filled, row: FilledRow) -> float | None:
    """What plots show of a row: its average where there is one, else the table's only score."""
    if row.average.measured is not None:
        return row.average.measured.value
    scores = [column for column in filled.table.columns if not column.timed]
    cell = row.cells[scores[0].key].measured if len(scores) == 1 else None
    return None if cell is None else cell.value


def points_of(filled: Filled, cost: str) -> list[Point]:
    """A point for every measured row; `cost` is "tokens" or "ttft_ms"."""
    found = []
    for row in filled.rows:
        value, quality = getattr(row, cost), quality_of(filled, row)
        if value is not None and quality is not None:
            found.append(Point(row.row.label, value, quality))
    return found


def plot(filled: Filled, cost: str, path: Path, demo: bool = False) -> bool:
    """Draw quality against `cost` to a PNG; False if nothing was measured."""
    from matplotlib.figure import Figure  # the [eval] extra; everything else runs without it

    points = points_of(filled, cost)
    if not points:
        return False
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        lines[point.label].append(point)
    for place, (label, own) in enumerate(lines.items()):
        own.sort(key=lambda p: p.cost)
        axes.plot(
            [p.cost for p in own],
            [p.quality for p in own],
            marker="osD^v<>ph*"[place % 10],
            linewidth=0.8,
            markersize=5,
            label=label,
        )
    front = pareto_front(points)
    axes.step(
        [p.cost for p in front],
        [p.quality for p in front],
        where="post",
        color="0.6",
        linewidth=3,
        alpha=0.6,
        zorder=0,
        label="Pareto front",
    )
    averaged = bool(filled.covered)
    unit = f"retention (%), mean over tasks: {len(filled.covered)}" if averaged else "score"
    names = {
        "tokens": "visual tokens that reach the language model",
        "ttft_ms": "time to the first token (ms per question, median)",
    }
    axes.set_xlabel(names[cost])
    axes.set_ylabel(unit)
    axes.set_title(f"{'DEMO: ' if demo else ''}{filled.table.title}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)
    return True
