"""HiPrune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, check_number, check_switch
from llava.pruning.registry import register
from llava.pruning.selection.rows import Picks, unscored
from llava.pruning.selection.topk import top_k
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class HiPrune(PruningMethod):
    """Keep what a middle layer attends to, with its neighbours, then what the deep layer does.

    Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in VLMs",
    arXiv 2508.00553. s is attention received: mean over heads and all queries, the class included.

        anchors     the round(alpha k / 5) patches with the highest s of the middle layer
        buffers     the patches a - 1, a + 1, a - columns, a + columns of each anchor a
        registers   the highest s of the layer that makes the features, until k are kept

    The middle layer is the 9th of 24, the same share of another tower's depth. At k = 64 there is
    one anchor; below k = 26 there is none.

    As in the released code, a buffer beyond the end of a row is a patch of the next row, and beyond
    the image the first or last patch; with wrap_neighbours=false only patches that touch the anchor
    are buffers.

    Where the released code differs: it divides one budget among all tiles and images of a call; on
    LLaVA-1.6 `mm_next_protocol="spatial"` divides it among the tiles of an image. An
    alpha with more anchors and buffers than k keeps the first k of them here, anchors first.

    Options: alpha, wrap_neighbours. Margins are not recorded. Tiles are pruned one by one, a joined
    choice has no neighbours. The "++" variant is not built: it adds the cosines of patches to the
    question, and what we have of it says neither which embeddings nor how they are weighed against
    attention.
    """

    name: ClassVar[str] = "hiprune"
    signal: ClassVar[str] = "attention received, two layers"
    paper: ClassVar[str] = "arXiv 2508.00553"
    needs: ClassVar[tuple[str, ...]] = ("received_attention", "object_attention")
    equivariant: ClassVar[bool] = False
    shares_budget: ClassVar[bool] = True
    fidelity: ClassVar[str] = "golden"

    alpha: float = 0.1
    wrap_neighbours: bool = True

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0, 5)
        check_switch("wrap_neighbours", self.wrap_neighbours)

    @property
    def needs_grid(self) -> bool:
        return True

    def importance(self, visual: VisualTokens) -> Tensor:
        return torch.stack(visual.extra("received_attention"))

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        assert importance is not None
        rows = []
        for tile, count in enumerate(counts.tolist()):
            valid = None if visual.valid is None else visual.valid[tile]
            anchored = self.anchored(
                visual.extra("object_attention")[tile], valid, visual.grid, count
            )
            rows.append(filled_up(anchored, importance[tile], valid, count))
        return unscored(rows)

    def anchored(
        self, scores: Tensor, valid: Tensor | None, grid: tuple[int, int], count: int
    ) -> list[int]:
        """Anchors, then their neighbours: at most `count` valid tokens, none twice."""
        number = min(round(self.alpha * count / 5), count)
        anchors = _highest(scores, valid, number)
        near = [n for anchor in anchors for n in self._neighbours(anchor, grid)]
        # A dictionary keeps the first of equal entries in its place.
        taken = list(dict.fromkeys(anchors + near))
        return [token for token in taken if valid is None or valid[token]][:count]

    def _neighbours(self, token: int, grid: tuple[int, int]) -> list[int]:
        rows, cols = grid
        if self.wrap_neighbours:
            around = (token - 1, token + 1, token - cols, token + cols)
            return [min(max(place, 0), rows * cols - 1) for place in around]
        row, col = divmod(token, cols)
        beside = ((row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col))
        return [r * cols + c for r, c in beside if 0 <= r < rows and 0 <= c < cols]


def _highest(scores: Tensor, valid: Tensor | None, count: int) -> list[int]:
    """The valid tokens of the highest scores, best first, ties to the lowest index."""
    row = top_k(scores[None], count, valid=None if valid is None else valid[None]).indices[0]
    of_row = zip(scores.index_select(0, row).tolist(), row.tolist(), strict=True)
    return [token for _, token in sorted(of_row, key=lambda pair: -pair[0])]


def filled_up(taken: list[int], scores: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """LongTensor [count]: tokens taken before, and the highest scores of the others."""
    first = torch.tensor(taken, dtype=torch.long, device=scores.device)
    rest = scores.index_fill(0, first, -torch.inf)[None]
    free = None if valid is None else valid.index_fill(0, first, False)[None]
    return torch.cat([first, top_k(rest, count - len(taken), valid=free).indices[0]])
