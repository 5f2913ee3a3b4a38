"""Evenly spaced tokens."""

from torch import Tensor

from llava.pruning.method import PruningMethod, Rows, register
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

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        rectangle = valid_rectangle(rows.tokens, row)
        shape = lattice_shape(count, *rectangle[2:]) if rectangle is not None else None
        if rectangle is None or shape is None:
            return tokens[centres(count, len(tokens), tokens.device)]
        top, left, height, width = rectangle
        down = top + centres(shape[0], height, tokens.device)
        across = left + centres(shape[1], width, tokens.device)
        return (down[:, None] * rows.tokens.grid[1] + across).flatten()
