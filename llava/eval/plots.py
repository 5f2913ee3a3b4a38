"""The plot of a result: accuracy against visual tokens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.eval.arms import UNPRUNED
from llava.eval.metrics import Row
from llava.eval.results import Record


def plot_accuracy(result: Record, path: Path) -> None:
    """Draw accuracy (per cent, bars of one standard error) against visual tokens, to a PNG."""
    from matplotlib.figure import Figure  # the [eval] extra; everything else runs without it
    from matplotlib.ticker import NullLocator, ScalarFormatter

    rows = [row for row in result["rows"] if not row["unavailable"]]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != UNPRUNED:
            curves[row["label"]].append(row)
    for position, (label, points) in enumerate(curves.items()):
        # Curves share their budgets: a small shift keeps error bars from hiding each other.
        shift = 1 + 0.012 * (position - (len(curves) - 1) / 2)
        axes.errorbar(
            [shift * (row["tokens_min"] + row["tokens_max"]) / 2 for row in points],
            [100 * row["accuracy"] for row in points],
            yerr=[100 * (row["accuracy_se"] or 0) for row in points],
            label=label,
            marker="osD^v<>ph*"[position % 10],
            linestyle="--" if points[0]["control"] else "-",
            linewidth=1.2,
            markersize=5,
            capsize=2,
        )
    flat = [row for row in rows if row["method"] == UNPRUNED]
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
    figure.savefig(path)
