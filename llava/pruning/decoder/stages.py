"""Stages that a calibration found for a model: a JSON file, read by `btp`."""

from __future__ import annotations

from typing import Any, NamedTuple

from llava.pruning.decoder.calibration_file import BTP_STAGES, read_calibration
from llava.pruning.errors import PruningError


class Stages(NamedTuple):
    """Before which layers (from 0) tokens are dropped, and the share of an image that is left."""

    layers: tuple[int, ...]
    keep: tuple[float, ...]


# Of a model with 32 layers.
RELEASED = Stages((3, 6, 14, 22), (288 / 576, 144 / 576, 48 / 576, 0.0))


def read_stages(path: str) -> Stages:
    """Read `{"kind": "btp-stages", "layers": [...], "keep": [...], "provenance": {...}}`.

    Raises:
        PruningError: the file cannot be read or holds anything else.
    """
    data = read_calibration(path, BTP_STAGES)
    layers: Any = data.get("layers")
    keep: Any = data.get("keep")
    if not _are_numbers(layers, (int,)) or layers != sorted({*layers}) or layers[0] < 1:
        raise PruningError(f"{path}: layers must be ascending whole numbers from 1, got {layers!r}")
    if not _are_numbers(keep, (int, float)) or not all(0 <= share <= 1 for share in keep):
        raise PruningError(f"{path}: keep must be shares in 0 to 1, got {keep!r}")
    if len(keep) != len(layers):
        raise PruningError(f"{path}: {len(layers)} layers need as many shares, got {len(keep)}")
    return Stages(tuple(layers), tuple(float(share) for share in keep))


def _are_numbers(values: Any, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(own, kinds) and not isinstance(own, bool) for own in values)
    )
