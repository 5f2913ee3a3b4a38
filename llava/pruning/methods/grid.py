"""Evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.method import PruningMethod
from llava.pruning.registry import register
from llava.pruning.selection.lattice import centres, lattice_shape, valid_rectangle
from llava.pruning.selection.max_min import selectable
from llava.pruning.selection.rows import Picks, unscored
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class Grid(PruningMethod):
    """Centres of an r x c = k lattice: sampling that looks at no content.

    Of all factors of k the pair nearest the grid's aspect; where no pair fits (or padding leaves no
    rectangle of patches) every (n / k)-th valid token in raster order, floor((i + .5) n / k).
    """

    name: ClassVar[str] = "grid"
    signal: ClassVar[str] = "place"
    equivariant: ClassVar[bool] = False

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        return unscored([self._tile(visual, t, int(k)) for t, k in enumerate(counts)])

    def _tile(self, visual: VisualTokens, tile: int, count: int) -> Tensor:
        tokens = selectable(visual.projected, visual.valid, tile)
        rectangle = valid_rectangle(visual, tile)
        shape = lattice_shape(count, *rectangle[2:]) if rectangle is not None else None
        if rectangle is None or shape is None:
            return tokens[centres(count, len(tokens)).to(tokens.device)]
        top, left, rows, cols = rectangle
        down, across = top + centres(shape[0], rows), left + centres(shape[1], cols)
        return (down[:, None] * visual.grid[1] + across).flatten().to(tokens.device)
