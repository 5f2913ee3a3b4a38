"""Pictures of a bench and of a scaling run, from their files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava.bench.scaling import AXES, exponents, median_ms
from llava.bench.schema import THIS, BenchResult, ScalingResult
from llava.bench.summary import ROWS, figures_of
from llava.utils import UserInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR = 0.28  # inches
COLOURS = ("0.75", "C1", "C3", "C4", "C5", "C0", "C2")


def draw_bench(result: BenchResult) -> Figure:
    """Draw where the time of every arm goes, a bar each, at the longest answer."""
    figure_class = _figure_class()
    figures, answer = figures_of(result), max(result["conditions"]["answers"])
    batches = result["conditions"]["batches"]
    height = 1.2 * len(batches) + BAR * len(figures)
    figure = figure_class(figsize=(8, height), dpi=150, layout="constrained")
    for plot, batch in zip(
        figure.subplots(len(batches), squeeze=False)[:, 0], batches, strict=True
    ):
        own = [f for f in figures if f.arm["batch"] == batch]
        names = [
            f"{f.arm['arm']} {'' if f.arm['source'] == THIS else f.arm['source']}" for f in own
        ]
        left = [0.0] * len(own)
        for step, colour in zip(ROWS, COLOURS, strict=True):
            times = [f.rows[step].median if step in f.rows else 0.0 for f in own]
            if step == "decode":
                times = [(answer - 1) * value for value in times]
            plot.barh(names, times, left=left, color=colour, label=step)
            left = [a + b for a, b in zip(left, times, strict=True)]
        plot.invert_yaxis()
        plot.set(xlabel=f"ms to token {answer} of the answer, batch {batch}")
        plot.tick_params(labelsize=7)
    plot.legend(fontsize=7, ncols=len(ROWS), frameon=False)
    conditions = result["conditions"]
    place = result["machine"].get("gpu") or conditions["device"]
    title = f"{conditions['model']}, {conditions['dtype']}, {place}"
    if conditions["layers"] != conditions["depth"]:
        title += f"; scaled from {conditions['layers']} to {conditions['depth']} decoder layers"
    figure.suptitle(title, fontsize=9)
    return figure


def draw_scaling(result: ScalingResult) -> Figure:
    """Draw time of the stage against every axis, with the fitted exponents in the legend."""
    figure = _figure_class()(figsize=(9, 6.5), dpi=150, layout="constrained")
    fitted = exponents(result["points"])
    axes = [axis for axis in AXES if any(p["axis"] == axis for p in result["points"])]
    plots = figure.subplots((len(axes) + 1) // 2, 2, squeeze=False).flatten()
    for plot, axis in zip(plots, axes, strict=False):
        for method in dict.fromkeys(p["method"] for p in result["points"]):
            own = [p for p in result["points"] if (p["axis"], p["method"]) == (axis, method)]
            if own:
                label = method
                if (axis, method) in fitted:
                    label += f", exponent {fitted[axis, method]:.2f}"
                sizes = [p[axis] for p in own]  # type: ignore[literal-required]
                plot.loglog(sizes, [median_ms(p) for p in own], marker="o", label=label)
        plot.set(xlabel=AXES[axis], ylabel="ms of the stage")
        ticks = sorted({p[axis] for p in result["points"] if p["axis"] == axis})  # type: ignore[literal-required]
        plot.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        plot.set_xticks([], minor=True)
        plot.grid(alpha=0.25)
        plot.legend(fontsize=7, frameon=False)
    for plot in plots[len(axes) :]:
        plot.remove()
    return figure


def check_plot(file: Path) -> None:
    """Refuse, before anything is run, a picture that could not be written.

    Raises:
        UserInputError: matplotlib is not installed, or does not know the kind of picture.
    """
    _figure_class()
    from matplotlib.backend_bases import FigureCanvasBase

    kind, known = file.suffix.lstrip("."), FigureCanvasBase.filetypes
    if kind not in known:
        raise UserInputError(f"--plot {file}: the name must end in one of .{', .'.join(known)}")


def _figure_class() -> type[Figure]:
    """Return matplotlib's class.

    Raises:
        UserInputError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserInputError("--plot needs matplotlib; pip install 'llava[eval]'") from error
    return Figure
