"""The plot of a result: accuracy against visual tokens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import Record
from llava.eval.metrics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 20 colours and 11 marks, which have no common divisor: 220 curves no two of which look the same.
COLOURS = "tab20"
MARKERS = "osD^v<>ph*P"
# Curves share their budgets: a small shift keeps error bars from hiding each other. Together the
# shifts stay below half the distance of budgets that differ by a third.
SHIFT, ALL_SHIFTS = 0.012, 0.14
LINE_OF_LEGEND = 0.19  # inches


def plot_accuracy(result: Record, path: Path) -> None:
    """Draw accuracy (per cent, bars of one standard error) against visual tokens, to a PNG."""
    draw_accuracy(result).savefig(path)


def draw_accuracy(result: Record) -> Figure:
    """The figure of `plot_accuracy`; it grows with the number of its curves."""
    # The [eval] extra; everything else runs without it.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    rows = [row for row in result["rows"] if not row["unavailable"]]
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != UNPRUNED:
            curves[row["label"]].append(row)
    flat = [row for row in rows if row["method"] == UNPRUNED]
    height = max(5.0, 1 + LINE_OF_LEGEND * (len(curves) + len(flat)))
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = colormaps[COLOURS].colors  # type: ignore[attr-defined]
    step = min(SHIFT, ALL_SHIFTS / max(1, len(curves)))
    for position, (label, points) in enumerate(curves.items()):
        shift = 1 + step * (position - (len(curves) - 1) / 2)
        axes.errorbar(
            [shift * (row["tokens_min"] + row["tokens_max"]) / 2 for row in points],
            [100 * row["accuracy"] for row in points],
            yerr=[100 * (row["accuracy_se"] or 0) for row in points],
            label=label,
            color=colours[position % len(colours)],
            marker=MARKERS[position % len(MARKERS)],
            linestyle="--" if points[0]["control"] else "-",
            linewidth=1.2,
            markersize=5,
            capsize=2,
        )
    for row, style in zip(flat, ("-", ":", "-."), strict=False):
        axes.axhline(
            100 * row["accuracy"], color="0.45", linestyle=style, linewidth=1, label=row["label"]
        )
    budgets = sorted({row["budget"] for points in curves.values() for row in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("visual tokens that reach the language model")
    axes.set_ylabel("accuracy (%), ± 1 standard error")
    axes.set_title(f"{result['questions']} questions about {result['images']} images", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
