"""Trained threshold heads of ATP-LLaVA, as our own file format holds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava.pruning.errors import PruningError

_KEY = re.compile(r"modules\.(\d+)\.(projection|redundant|spatial)\.(weight|bias)")
_PARTS = tuple(
    f"{p}.{k}" for p in ("projection", "redundant", "spatial") for k in ("weight", "bias")
)


@dataclass(frozen=True, eq=False)
class ThresholdHeads:
    """The heads of one module.

    Attributes:
        projection: weight [C, 2 N] and bias [C].
        redundant, spatial: weights [1, C] and biases [1].
    """

    projection: tuple[Tensor, Tensor]
    redundant: tuple[Tensor, Tensor]
    spatial: tuple[Tensor, Tensor]

    @property
    def tokens(self) -> int:
        """N, tokens of an image before any pruning."""
        return self.projection[0].shape[1] // 2

    def thresholds(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return theta_r and theta_s, [I, 1] each, of scores [I, 2 N]."""

        def linear(values: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
            weight, bias = (part.to(values) for part in head)
            return torch.nn.functional.linear(values, weight, bias)

        hidden = linear(scores, self.projection)
        return linear(hidden, self.redundant).sigmoid(), linear(hidden, self.spatial).sigmoid()


def read_heads(path: Path) -> dict[int, ThresholdHeads]:
    """Read a heads file: module by the layer before which it drops tokens, ascending.

    The file is safetensors with six tensors for each module, l being that layer, from 0:
    `modules.l.projection.weight` [C, 2 N] and `.bias` [C], `modules.l.redundant.weight` [1, C] and
    `.bias` [1], `modules.l.spatial.weight` [1, C] and `.bias` [1].

    Raises:
        PruningError: the file cannot be read, or holds something else.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PruningError(f"heads {path} cannot be read as safetensors: {error}") from error
    for name in tensors:
        if _KEY.fullmatch(name) is None:
            raise PruningError(f"heads {path} hold {name!r}; names must be modules.LAYER.PART.KIND")
    layers = sorted({int(name.split(".")[1]) for name in tensors})
    if not layers:
        raise PruningError(f"heads {path} hold no module")
    return {layer: _module(path, tensors, layer) for layer in layers}


def _module(path: Path, tensors: dict[str, Tensor], layer: int) -> ThresholdHeads:
    names = [f"modules.{layer}.{part}" for part in _PARTS]
    for name in names:
        if name not in tensors:
            raise PruningError(f"heads {path} lack {name}")
    parts = [tensors[name] for name in names]
    shape = tuple(parts[0].shape)
    width = shape[0] if len(shape) == 2 else 0
    wanted = [shape, (width,), (1, width), (1,), (1, width), (1,)]
    for name, part, size in zip(names, parts, wanted, strict=True):
        if len(shape) != 2 or shape[1] % 2 or tuple(part.shape) != size:
            raise PruningError(
                f"{name} of heads {path} is {[*part.shape]}; shapes must be [C, 2 N] and [C], then "
                "[1, C] and [1] twice"
            )
        if not part.isfinite().all():
            raise PruningError(f"{name} of heads {path} holds NaN or inf")
    return ThresholdHeads((parts[0], parts[1]), (parts[2], parts[3]), (parts[4], parts[5]))
