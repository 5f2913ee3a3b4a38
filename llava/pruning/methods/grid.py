"""Evenly spaced tokens."""

from torch import Tensor

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, register
from llava.pruning.selection.lattice import centres, lattice_shape, valid_rectangle


@register
class Grid(PruningMethod):
    """Centres of an r x c = k lattice: sampling that looks at no content.

    Of all factors of k the pair nearest the grid's aspect; where no pair fits (or padding leaves no
    rectangle of patches) every (n / k)-th valid token in raster order, floor((i + .5) n / k).
    """

    name = "grid"
    signal = "place"
    equivariant = False

    def select(self, rows: Rows) -> Picks:
        return Picks.stack([_spaced(rows.tokens, *row) for row in rows])


def _spaced(visual: VisualTokens, tile: int, count: int, tokens: Tensor) -> Tensor:
    """Return `count` of a tile's valid tokens, LongTensor."""
    rectangle = valid_rectangle(visual, tile)
    shape = lattice_shape(count, *rectangle[2:]) if rectangle is not None else None
    if rectangle is None or shape is None:
        return tokens[centres(count, len(tokens)).to(tokens.device)]
    top, left, rows, cols = rectangle
    down, across = top + centres(shape[0], rows), left + centres(shape[1], cols)
    return (down[:, None] * visual.grid[1] + across).flatten().to(tokens.device)
