"""Small inputs given by formula, with the picks an independent float64 reference made of them.

i counts 36 tokens, k 8 features, m 3 words; angles are in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens
from llava.pruning.method import PruningMethod

_I = torch.arange(36, dtype=torch.float64)
_K = torch.arange(8, dtype=torch.float64)
_M = torch.arange(3, dtype=torch.float64)

TOKENS = (
    torch.sin(0.7 * _I[:, None] * (_K + 1) + 0.3 * _K * _K)
    + 0.5 * torch.cos(0.37 * _I)[:, None]
    + 0.4
)
_ATTENTION = torch.exp(torch.sin(1.1 * _I + 0.5))
ATTENTION = _ATTENTION / _ATTENTION.sum()  # of the class token
TEXT_COSINE = torch.cos(0.9 * _I)
TEXT = torch.cos(0.5 * (_M[:, None] + 1) * (_K + 1))


def visual(dtype: torch.dtype = torch.float64, **extras: Tensor) -> VisualTokens:
    """The tokens as one image, the same before and after the projector, with class attention."""
    z = TOKENS[None].to(dtype)
    extras = {"cls_attention": ATTENTION} | extras
    return VisualTokens(
        *(z, z.clone(), nn.Identity(), torch.zeros(1, dtype=torch.long), (6, 6)),
        extras={name: [value.to(dtype)] for name, value in extras.items()},
    )


def picks(tokens: VisualTokens, name: str, count: int, **options: object) -> list[int]:
    """What a method picks, in the order it picks."""
    chosen = method(name, **options)
    rows = chosen.rows(tokens, chosen.score(tokens), torch.tensor([count]))
    return chosen.select(rows).indices[0].tolist()


def method(name: str, **options: object) -> PruningMethod:
    """A method by name."""
    return PruningConfig.of(name, keep_tokens=1, **options).pruner


def row(text: str) -> list[int]:
    """`"3 1 2"` -> [3, 1, 2]."""
    return [int(word) for word in text.split()]


def check_inputs() -> None:
    """The first and the last token, as the reference lists them."""
    first = [0.9, 1.19552, 1.832039, 1.32738, -0.096165, 1.838, -0.080936, 1.745747]
    last = [0.272299, 0.041333, 0.220798, 1.031887, 1.861512, 0.33081, 0.95117, 0.651978]
    want = torch.tensor([first, last], dtype=torch.float64)
    torch.testing.assert_close(TOKENS[[0, -1]], want, atol=1e-6, rtol=0)
