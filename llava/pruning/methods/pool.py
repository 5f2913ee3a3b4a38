"""Average pooling."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llava.pruning.errors import PruningError
from llava.pruning.method import Merged, PruningMethod, VisualTokens, register
from llava.pruning.selection.lattice import Rectangle, lattice_shape, valid_rectangle


@register
class Pool(PruningMethod):
    """Adaptive average pooling of projected tokens to r x c = k: a smaller picture of it all.

    Of all factors of k the pair nearest the grid's aspect. A budget without such factors is an
    error naming the nearest budgets that have them.
    """

    name = "pool"
    signal = "place"
    merges = True
    equivariant = False

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        made = []
        # Pooling the identity matrix shows which patches went into which output.
        total, device = tokens.projected.shape[1], tokens.projected.device
        identity = torch.eye(total, dtype=torch.float32, device=device)
        for tile, count in enumerate(counts.tolist()):
            rectangle = valid_rectangle(tokens, tile)
            if rectangle is None:
                raise PruningError(f"pool: the valid patches of tile {tile} form no rectangle")
            shape = _shape(count, rectangle)
            new, share = (
                _pool(values, tokens.grid, rectangle, shape)
                for values in (tokens.projected[tile], identity)
            )
            made.append((new, share > 0))
        return Merged.stack(made)


def _pool(z: Tensor, grid: tuple[int, int], rectangle: Rectangle, shape: tuple[int, int]) -> Tensor:
    """Pool the rectangle of one tile's tokens z [N, D] to [r * c, D]."""
    top, left, rows, cols = rectangle
    picture = z.view(*grid, -1)[top : top + rows, left : left + cols]
    return adaptive_avg_pool2d(picture.permute(2, 0, 1), shape).flatten(1).T


def _shape(count: int, rectangle: Rectangle) -> tuple[int, int]:
    rows, cols = rectangle[2:]
    shape = lattice_shape(count, rows, cols)
    if shape is None:
        works = [k for k in range(1, rows * cols + 1) if lattice_shape(k, rows, cols)]
        below = max(k for k in works if k < count)
        above = min(k for k in works if k > count)
        raise PruningError(
            f"pool cannot make {count} tokens of {rows} x {cols} patches: no r x c = {count} fits; "
            f"the nearest budgets a tile that work are {below} and {above}"
        )
    return shape
