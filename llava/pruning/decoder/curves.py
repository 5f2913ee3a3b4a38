"""How attention to visual tokens grows with their place: released curves, and fitted ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava.pruning.decoder.calibration_file import PORE_CURVE, read_calibration
from llava.pruning.errors import PruningError

NO_CURVE, CUBIC = "none", "fastv"

# Host -> benchmark -> b of the released weights exp(-b i / N).
_PER_BENCHMARK = {
    "pyramiddrop": {
        "mme": 1.881,
        "gqa": 2.298,
        "mmvet": 2.381,
        "mmbench": 1.528,
        "mmbench-cn": 1.496,
        "pope": 2.333,
        "scienceqa": 1.554,
        "textvqa": 1.813,
        "vizwiz": 1.451,
        "vqav2": 2.164,
    },
    "sparsevlm": {
        "gqa": 1.326,
        "mmbench": 1.841,
        "mmbench-cn": 1.497,
        "mme": 2.190,
        "mmvet": 2.434,
        "pope": 2.671,
        "scienceqa": 1.724,
        "textvqa": 1.813,
        "vizwiz": 1.579,
        "vqav2": 2.374,
    },
}
# Name -> b. That of a host alone is the mean over its benchmarks.
RELEASED = {host: sum(values.values()) / len(values) for host, values in _PER_BENCHMARK.items()} | {
    f"{host}-{name}": value
    for host, values in _PER_BENCHMARK.items()
    for name, value in values.items()
}


def curve_weights(curve: str | float, place: Tensor, total: Tensor | int) -> Tensor:
    """Return what scores are multiplied with: one over the curve, float64, as large as `place`.

    Args:
        curve: a name, a file that `llava calibrate pore` wrote, or b of exp(b i / N).
        place: of tokens in the unpruned sequence of their image, from 0.
        total: tokens of that sequence; a tensor is broadcast.

    Raises:
        PruningError: there is no such curve or file.
    """
    x = place.double() / total
    if curve == NO_CURVE:
        return torch.ones_like(x)
    if curve == CUBIC:
        return 1 / (1 + 1.7367538 * x - 4.8432356 * x**2 + 4.9096523 * x**3)
    return torch.exp(-(growth(curve) if isinstance(curve, str) else curve) * x)


def growth(curve: str) -> float:
    """Return b of the curve exp(b i / N) that is released by that name, or that a file holds.

    Raises:
        PruningError: there is no such curve or file.
    """
    if curve in RELEASED:
        return RELEASED[curve]
    if not curve.endswith(".json"):
        names = ", ".join([NO_CURVE, CUBIC, *RELEASED])
        raise PruningError(
            f"there is no curve {curve!r}; use one of {names}, or a .json file of "
            "llava calibrate pore"
        )
    value = read_calibration(curve, PORE_CURVE).get("sigma")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise PruningError(f"sigma in {curve} must be a number, got {value!r}; write it again")
    return float(value)
