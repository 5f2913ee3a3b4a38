"""Regular r x c lattices on a tile's grid of patches."""

import math

import torch
from torch import Tensor

from llava.pruning.tokens import VisualTokens

# First row, first column, rows, columns of a rectangle of patches.
Rectangle = tuple[int, int, int, int]


def lattice_shape(k: int, rows: int, cols: int) -> tuple[int, int] | None:
    """Return (r, c) with r * c = k, r <= rows, c <= cols, nearest the aspect rows : cols.

    Of two equally near shapes the one with more rows. None if no such factors exist.
    """
    shapes = [(r, k // r) for r in range(min(rows, k), 0, -1) if k % r == 0 and k // r <= cols]
    # Rounded: 16 x 8 and 8 x 16 on a square grid are equally near, not apart by the last bit.
    return min(
        shapes,
        key=lambda shape: round(abs(math.log(shape[0] * cols / (shape[1] * rows))), 9),
        default=None,
    )


def centres(count: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return floor((i + .5) * size / count), the centres of equal parts: LongTensor [count]."""
    return (2 * torch.arange(count, device=device) + 1) * size // (2 * count)


def valid_rectangle(visual: VisualTokens, tile: int) -> Rectangle | None:
    """Return the rectangle that a tile's valid patches fill; None if they fill none."""
    rows, cols = visual.grid
    if visual.valid is None:
        return 0, 0, rows, cols
    mask = visual.valid[tile].view(rows, cols)
    down, across = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if len(down) == 0:
        return None
    top, left = int(down[0]), int(across[0])
    height, width = int(down[-1]) + 1 - top, int(across[-1]) + 1 - left
    return (top, left, height, width) if int(mask.sum()) == height * width else None
