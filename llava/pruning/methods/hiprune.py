"""HiPrune."""

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, Rows, VisualTokens, option, register


@register
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

    name = "hiprune"
    signal = "attention received, two layers"
    paper = "arXiv 2508.00553"
    needs = ("received_attention", "object_attention")
    equivariant = False
    needs_grid = True
    shares_budget = True
    fidelity = "golden"

    alpha: float = option(0.1, at_least=0, at_most=5)
    wrap_neighbours: bool = option(True)

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(tokens.extra("received_attention"))

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        middle, deep = rows.tokens.extra("object_attention")[row], rows.scored[row]
        return self.choose(middle, deep, tokens, count, rows.tokens.grid)

    def choose(
        self, middle: Tensor, deep: Tensor, tokens: Tensor, count: int, grid: tuple[int, int]
    ) -> Tensor:
        """Return `count` of `tokens`: anchors and buffers by `middle` [N], registers by `deep`."""
        middle, deep = (
            tokens[scores[tokens].argsort(descending=True, stable=True)[:count]]
            for scores in (middle, deep)
        )
        anchors = middle[: round(self.alpha * count / 5)]
        order = torch.cat([anchors, self._neighbours(anchors, grid).flatten(), deep])
        # Every token's first place in that order; what has none, or is padding, comes last.
        never = order.new_full((grid[0] * grid[1],), len(order))
        place = never.scatter_reduce(
            0, order, torch.arange(len(order), device=order.device), "amin"
        )
        return tokens[place[tokens].argsort(stable=True)[:count]]

    def _neighbours(self, anchors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the buffers of every anchor [a], [a, 4]; the anchor itself where there is none."""
        rows, cols = grid
        around = torch.stack([anchors - 1, anchors + 1, anchors - cols, anchors + cols], dim=1)
        if self.wrap_neighbours:
            return around.clamp(0, rows * cols - 1)
        column = anchors % cols
        beyond = torch.stack([column == 0, column == cols - 1], dim=1)
        beyond = torch.cat([beyond, (around[:, 2:] < 0) | (around[:, 2:] >= rows * cols)], dim=1)
        return torch.where(beyond, anchors[:, None], around)
