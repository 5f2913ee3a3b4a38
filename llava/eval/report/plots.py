"""Plots of score against cost, for a result file and for a table of a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import Record
from llava.eval.tables.fill import Filled, FilledRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 20 colours and 11 marks, which have no common divisor: 220 curves no two of which look the same.
COLOURS = "tab20"
MARKERS = "osD^v<>ph*P"
# Curves share their budgets: a small shift keeps error bars from hiding each other. Together the
# shifts stay below half the distance of budgets that differ by a third.
SHIFT, ALL_SHIFTS = 0.012, 0.14
LINE_OF_LEGEND = 0.19  # inches
CURVE: dict[str, Any] = {"linewidth": 1.2, "markersize": 5, "capsize": 2}
FRONT: dict[str, Any] = {"where": "post", "color": "0.6", "linewidth": 3, "alpha": 0.6, "zorder": 0}
COSTS = {
    "tokens": "visual tokens in the language model, mean over layers",
    "ttft_ms": "time to the first token (ms per question, median)",
}


@dataclass(frozen=True)
class Point:
    """One row in a plot: `cost` is better when lower, `quality` when higher."""

    label: str
    cost: float
    quality: float
    error: float = 0.0
    control: bool = False


def draw_accuracy(result: Record) -> Figure:
    """Draw accuracy (per cent, bars of one standard error) against visual tokens.

    The figure grows with the number of its curves.
    """
    rows = [row for row in result["rows"] if not row["unavailable"]]
    pruned = [row for row in rows if row["method"] != UNPRUNED]
    return _draw(
        [
            Point(
                row["label"],
                cost=_tokens(row),
                quality=100 * row["accuracy"],
                error=100 * (row["accuracy_se"] or 0),
                control=row["control"] is not None,
            )
            for row in pruned
        ],
        title=f"{result['questions']} questions about {result['images']} images",
        axes=(COSTS["tokens"], "accuracy (%), ± 1 standard error"),
        levels={row["label"]: 100 * row["accuracy"] for row in rows if row["method"] == UNPRUNED},
        budgets=sorted({row["budget"] for row in pruned}),
    )


def _tokens(row: Record) -> float:
    """Return the visual tokens of a prompt; where layers drop some, their mean over layers."""
    if "between_layers" in row:
        return float(row["between_layers"]["tokens_mean"])
    return float(row["tokens_min"] + row["tokens_max"]) / 2


def plot_table(filled: Filled, cost: str, path: Path) -> bool:
    """Draw quality against `cost`, a key of `COSTS`, to a PNG; False if nothing was measured."""
    points, count = points_of(filled, cost), len(filled.covered)
    if not points:
        return False
    title = f"{'DEMO: ' if filled.demo else ''}{filled.table.title}"
    quality = f"retention (%), mean over tasks: {count}" if count else "score"
    axes = COSTS[cost], quality
    _draw(points, title=title, axes=axes, front=pareto_front(points)).savefig(path)
    return True


def points_of(filled: Filled, cost: str) -> list[Point]:
    """Return a point for every measured row; `cost` is a key of `COSTS`."""
    measured = [(row, getattr(row, cost), _quality(filled, row)) for row in filled.rows]
    return [
        Point(row.row.label, value, quality)
        for row, value, quality in measured
        if value is not None and quality is not None
    ]


def _quality(filled: Filled, row: FilledRow) -> float | None:
    """Return the average of a row where there is one, else the table's only score."""
    scores = [column for column in filled.table.columns if not column.timed]
    measured = row.average.measured
    if measured is None and len(scores) == 1:
        measured = row.cells[scores[0].key].measured
    return None if measured is None else measured.value


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats on one axis without losing on the other, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def _draw(
    points: Sequence[Point],
    *,
    title: str,
    axes: tuple[str, str],
    levels: Mapping[str, float] | None = None,
    budgets: Sequence[int] = (),
    front: Sequence[Point] = (),
) -> Figure:
    """Draw one curve per label.

    Args:
        points: of all curves.
        title: of the plot.
        axes: labels of cost and quality.
        levels: horizontal lines by label.
        budgets: ticks of a logarithmic axis that all curves share; they are shifted a little.
        front: a Pareto front to draw behind the curves.
    """
    # The [eval] extra; everything else runs without it.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves: dict[str, list[Point]] = {point.label: [] for point in points}
    for point in sorted(points, key=lambda point: point.cost):
        curves[point.label].append(point)
    levels = levels or {}
    height = max(5.0, 1 + LINE_OF_LEGEND * (len(curves) + len(levels)))
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    plot = figure.subplots()
    colours = colormaps[COLOURS].colors  # type: ignore[attr-defined]
    step = min(SHIFT, ALL_SHIFTS / max(1, len(curves))) if budgets else 0
    for position, (label, own) in enumerate(curves.items()):
        shift = 1 + step * (position - (len(curves) - 1) / 2)
        errors = [point.error for point in own]
        plot.errorbar(
            [shift * point.cost for point in own],
            [point.quality for point in own],
            yerr=errors if any(errors) else None,
            label=label,
            color=colours[position % len(colours)],
            marker=MARKERS[position % len(MARKERS)],
            linestyle="--" if own[0].control else "-",
            **CURVE,
        )
    for (label, level), style in zip(levels.items(), ("-", ":", "-."), strict=False):
        plot.axhline(level, color="0.45", linestyle=style, linewidth=1, label=label)
    if budgets:
        plot.set_xscale("log", base=2)
        plot.set_xticks(budgets, [str(budget) for budget in budgets])
        plot.set_xticks([], minor=True)
    if front:
        costs, qualities = [p.cost for p in front], [p.quality for p in front]
        plot.step(costs, qualities, label="Pareto front", **FRONT)
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.set_title(title, fontsize=10)
    plot.grid(alpha=0.25)
    plot.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
