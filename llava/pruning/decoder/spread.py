"""Tokens spread over the image, and tokens unlike those that were taken."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from llava.pruning.decoder.columns import PlacedImage
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE
from llava.pruning.selection.max_min import first_argmax


def farthest(distances: Tensor, taken: Tensor, count: int) -> Tensor:
    """Take tokens greedily, each the farthest from its nearest among those that were taken.

    Args:
        distances: [N, N].
        taken: BoolTensor [N], at least one True.
        count: how many more, at most as many as are left.

    Returns:
        LongTensor [count], in pick order; ties go to the lowest index.
    """
    far = distances.masked_fill(~taken[:, None], torch.inf).amin(dim=0)
    far = far.masked_fill(taken, -1)
    picks = []
    for _ in range(count):
        pick = first_argmax(far[None])
        picks.append(pick)
        far = torch.minimum(far, distances.index_select(0, pick)[0]).index_fill(0, pick, -1)
    return torch.cat(picks) if picks else taken.new_empty(0, dtype=torch.long)


def spread_over(cells: Tensor, count: int) -> Tensor:
    """Take the first token, then always the farthest on the image grid, in Manhattan distance.

    Args:
        cells: [N, 3] of `cells_of`.
        count: 1 to N.

    Returns:
        LongTensor [count], in pick order; ties go to the lowest index.
    """
    cells = cells.double()
    distances = torch.cdist(cells, cells, p=1)
    first = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
    first[:1] = True
    return torch.cat([first.nonzero()[:, 0], farthest(distances, first, count - 1)])


def cells_of(image: PlacedImage, place: Tensor) -> Tensor:
    """Return where tokens lie in their image: LongTensor [N, 3] of (view, row, column).

    Tokens of two tiles (LLaVA-1.6) are farther apart than any two of one: a tile counts as far as
    its rows and columns together. A newline lies behind the token before it.

    Args:
        image: without a layout its tokens are taken for a square.
        place: LongTensor [N], their places in the image's unpruned sequence.

    Raises:
        PruningError: nothing says how the tokens lie in the image.
    """
    if image.layout is None:
        side = isqrt(image.total)
        if side * side != image.total:
            raise PruningError(
                f"btp spreads tokens over the image, and nothing says how its {image.total} lie in "
                "it; take another decoder method"
            )
        return torch.stack([place * 0, place // side, place % side], dim=1)
    rows, columns = image.layout.grid
    ids = image.layout.sequence_on(place.device)
    ended = ids == NEWLINE
    ids = torch.where(ended, ids.roll(1), ids)[place]
    patch = ids % image.layout.patches
    column = patch % columns + ended[place]
    view = ids // image.layout.patches * (rows + columns)
    return torch.stack([view, patch // columns, column], dim=1)
