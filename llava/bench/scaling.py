"""How the time of the stage grows with tokens, budget, width and batch, and by which exponent."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava.bench.arms import split_method
from llava.bench.rates import finish
from llava.bench.schema import SCHEMA_VERSION, Point, ScalingResult
from llava.bench.stage import random_tokens, repeat
from llava.markdown import table
from llava.pruning import PruningConfig, prune_visual_tokens
from llava.storage import dump_json, write_atomically

AXES = {
    "tokens": "tokens of an image, a ninth of them kept",
    "keep": "tokens kept",
    "width": "width of the tokens",
    "batch": "images of a batch",
}
# Widths of LLaVA-1.5-7B; every axis varies one of these.
DEFAULT = {"tokens": 576, "keep": 64, "width": 4096, "batch": 1}
SIZES = {
    "tokens": (144, 288, 576, 1152, 2304, 4608, 11520),
    "keep": (16, 32, 64, 128, 256, 512),
    "width": (512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16),
}
METHODS = ("zoo-exact", "divprune", "zoo")
SHARE = 9  # of the tokens are kept on the axis of tokens: one in so many
# Points from this time on count for an exponent: below, calls cost as much as their work.
LEAST_MS = 0.5
FEWEST = 3  # points of an exponent
LAUNCH_BOUND = "launch-bound"  # instead of an exponent


def run_scaling(
    methods: Sequence[str],
    facts: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    output: Path | None,
    sizes: Mapping[str, Sequence[int]] = SIZES,
    default: Mapping[str, int] = DEFAULT,
    say: Callable[[str], None] = print,
) -> ScalingResult:
    """Measure every axis for every method and write `output` after every point.

    An axis ends after the first size of which one call takes longer than `seconds`.

    Args:
        methods: that read nothing of the tower, options after a colon as in `zoo:directions=32`.
        facts: command, commit, versions, machine.
        device, dtype: of the tokens.
        seconds: of every point; at least three calls are made.
        output: file; None writes nothing.
        sizes: of every axis.
        default: what the other axes are meanwhile.
        say: takes lines about progress.
    """
    conditions = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "default": dict(default),
    }
    result: ScalingResult = {
        "schema_version": SCHEMA_VERSION,
        "kind": "scaling",
        **facts,  # type: ignore[typeddict-item]
        "conditions": conditions,
        "complete": False,
        "points": [],
        "stopped": [],
    }
    for method in methods:
        _config(method, default["keep"])  # refused before anything is measured
    for method in methods:
        for axis, values in sizes.items():
            say(f"{method}: {AXES[axis]}")
            for value in values:
                point = _measure(method, axis, {**default, axis: value}, device, dtype, seconds)
                result["points"].append(point)
                _save(result, output)
                if min(point["times"]) > 1000 * seconds and value != values[-1]:
                    result["stopped"].append(f"{method}, {axis} above {value}")
                    break
    result["complete"] = True
    _save(result, output)
    return result


def _save(result: ScalingResult, output: Path | None) -> None:
    if output is not None:
        write_atomically(output, dump_json(result))


def _measure(
    method: str,
    axis: str,
    sizes: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> Point:
    keep = sizes["tokens"] // SHARE if axis == "tokens" else sizes["keep"]
    config = _config(method, keep)
    visual = random_tokens(sizes["batch"], 1, sizes["tokens"], sizes["width"], device, dtype)
    with torch.inference_mode():
        start = time.perf_counter()
        prune_visual_tokens(visual, config)  # not counted: caches, compilers
        finish(device)
        slow = time.perf_counter() - start > seconds
        times = repeat(
            lambda: prune_visual_tokens(visual, config), device, seconds, least=1 if slow else 3
        )
    return {
        "axis": axis,
        "method": method,
        "tokens": sizes["tokens"],
        "keep": keep,
        "width": sizes["width"],
        "batch": sizes["batch"],
        "times": [round(value, 5) for value in times],
    }


def _config(method: str, keep: int) -> PruningConfig:
    name, options = split_method(method)
    return PruningConfig.of(name, keep_tokens=keep, **options)


def median_ms(point: Point) -> float:
    """Return the median time of a point."""
    return statistics.median(point["times"])


def exponents(points: Sequence[Point]) -> dict[tuple[str, str], float]:
    """Fit ms = c * size^exponent to every axis and method by least squares of the logarithms.

    Only sizes that take `LEAST_MS` count, and none is fitted to fewer than `FEWEST`.
    """
    fitted = {}
    for axis, method in dict.fromkeys((p["axis"], p["method"]) for p in points):
        own = [
            (math.log(point[axis]), math.log(median_ms(point)))  # type: ignore[literal-required]
            for point in points
            if (point["axis"], point["method"]) == (axis, method) and median_ms(point) >= LEAST_MS
        ]
        if len(own) < FEWEST:
            continue
        fitted[axis, method] = statistics.linear_regression(*zip(*own, strict=True)).slope
    return fitted


def render_scaling(result: ScalingResult) -> str:
    """Return the table of a scaling run: milliseconds by size, and the exponents."""
    points, fitted = result["points"], exponents(result["points"])
    conditions, parts = result["conditions"], []
    place = result["machine"].get("gpu") or (
        f"{conditions['device']} ({result['machine'].get('torch_threads')} threads)"
    )
    fixed = ", ".join(f"{name} {value}" for name, value in conditions["default"].items())
    parts.append(
        f"Milliseconds of the stage (score, select, gather; median), {conditions['dtype']}, "
        f"{place}; what is not varied: {fixed}. Made by `{result['command']}`."
    )
    for axis in dict.fromkeys(p["axis"] for p in points):
        own = [p for p in points if p["axis"] == axis]
        values = sorted({p[axis] for p in own})  # type: ignore[literal-required]
        lines = []
        for method in dict.fromkeys(p["method"] for p in own):
            cells = {p[axis]: f"{median_ms(p):.3g}" for p in own if p["method"] == method}  # type: ignore[literal-required]
            exponent = fitted.get((axis, method))
            few = "—" if len(cells) < FEWEST else LAUNCH_BOUND
            shown = few if exponent is None else f"{exponent:.2f}"
            lines.append([method, *(cells.get(value, "") for value in values), shown])
        parts.append(table([AXES[axis], *map(str, values), "exponent"], lines))
    if any(LAUNCH_BOUND in part for part in parts):
        parts.append(
            f"{LAUNCH_BOUND}: fewer than {FEWEST} sizes take {LEAST_MS} ms; below that launching "
            "the work takes as long as doing it, and no exponent is fitted."
        )
    if result.get("stopped"):
        limit = f"a call took longer than {conditions['seconds']:g} s"
        parts.append(f"Not measured, because {limit}: {'; '.join(result['stopped'])}.")
    return "\n\n".join(parts)
