"""Tokens and class attention given by formula, for picks an independent float64 reference made.

i counts 36 tokens, k 8 features; angles are in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens

_I = torch.arange(36, dtype=torch.float64)
_K = torch.arange(8, dtype=torch.float64)

X = (
    torch.sin(0.7 * _I[:, None] * (_K + 1) + 0.3 * _K * _K)
    + 0.5 * torch.cos(0.37 * _I)[:, None]
    + 0.4
)


def attention() -> Tensor:
    """[36] class attention."""
    a = torch.exp(torch.sin(1.1 * _I + 0.5))
    return a / a.sum()


def visual(dtype: torch.dtype = torch.float64, **extras: Tensor) -> VisualTokens:
    """The tokens as one image, the same before and after the projector, with class attention."""
    z = X[None].to(dtype)
    index = torch.zeros(1, dtype=torch.long)
    readings = {"cls_attention": attention()} | extras
    return VisualTokens(
        *(z, z.clone(), nn.Identity(), index, (6, 6)),
        extras={name: [value.to(dtype)] for name, value in readings.items()},
    )


def picks(tokens: VisualTokens, name: str, count: int, **options: object) -> list[int]:
    """What a method picks, in the order it picks."""
    method = PruningConfig.of(name, keep_tokens=1, **options).pruner
    importance = method.importance(tokens)
    return method.choose(tokens, importance, torch.tensor([count])).indices[0].tolist()
