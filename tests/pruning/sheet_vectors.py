"""Small inputs given by formula, with the picks an independent float64 reference made of them.

i counts 36 tokens, k 8 features, m 3 words; angles are in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens
from llava.pruning.methods.base import PruningMethod

_I = torch.arange(36, dtype=torch.float64)
_K = torch.arange(8, dtype=torch.float64)
_M = torch.arange(3, dtype=torch.float64)

TOKENS = (
    torch.sin(0.7 * _I[:, None] * (_K + 1) + 0.3 * _K * _K)
    + 0.5 * torch.cos(0.37 * _I)[:, None]
    + 0.4
)
TEXT_COSINE = torch.cos(0.9 * _I)
TEXT = torch.cos(0.5 * (_M[:, None] + 1) * (_K + 1))


def visual(dtype: torch.dtype = torch.float64, **settings) -> VisualTokens:
    """The tokens as one image, the same before and after the projector."""
    z = TOKENS[None].to(dtype)
    index = torch.zeros(1, dtype=torch.long)
    return VisualTokens(z, z.clone(), nn.Identity(), index, (6, 6), **settings)


def picks(method: PruningMethod, tokens: VisualTokens, count: int) -> list[int]:
    """What `method` picks, in the order it picks."""
    importance = method.importance(tokens)
    return method.choose(tokens, importance, torch.tensor([count])).indices[0].tolist()


def method(name: str, **options) -> PruningMethod:
    """A method by name."""
    return PruningConfig.of(name, keep_tokens=1, **options).pruner


def row(text: str) -> list[int]:
    """`"3 1 2"` -> [3, 1, 2]."""
    return [int(word) for word in text.split()]


def check_inputs(x: Tensor = TOKENS) -> None:
    """The first and the last token, as the reference lists them."""
    first = [0.9, 1.19552, 1.832039, 1.32738, -0.096165, 1.838, -0.080936, 1.745747]
    last = [0.272299, 0.041333, 0.220798, 1.031887, 1.861512, 0.33081, 0.95117, 0.651978]
    want = torch.tensor([first, last], dtype=torch.float64)
    torch.testing.assert_close(x[[0, -1]], want, atol=1e-6, rtol=0)
