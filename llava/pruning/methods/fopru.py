"""FoPru."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, check_choice, check_switch
from llava.pruning.registry import register
from llava.pruning.selection.max_min import selectable
from llava.pruning.selection.rows import Picks, unscored
from llava.pruning.selection.topk import top_k
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class FoPru(PruningMethod):
    """Keep the patches, or the rows of patches, that the vision tower attends to most.

    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164.

        significance   s_j, attention received by patch j in the block that makes the features
        rank           the k highest s
        row            whole rows of the grid by their mean s, best first
        reordering     raster order

    Reconstructed: no code is public and the formula of s was not available to us. Here s is the
    mean over heads and over the patches' queries, `significance="received"`; "class" takes the
    class token's query instead, which is FasterVLM. A budget that is no multiple of a row's patches
    is filled up with the best patches of the next row, so that k tokens stay k tokens; the paper's
    rounding is open.

    Options: strategy `rank` | `row`; significance `received` | `class`; class_query, whether the
    class token counts among the queries of "received". A tower without one gives "received" for
    both, and the trace says so of "class".
    """

    name: ClassVar[str] = "fopru"
    signal: ClassVar[str] = "attention received"
    paper: ClassVar[str] = "arXiv 2411.14164"
    needs: ClassVar[tuple[str, ...]] = ("cls_attention", "received_attention")
    fidelity: ClassVar[str] = "reconstructed"

    strategy: str = "rank"
    significance: str = "received"
    class_query: bool = False

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, ("rank", "row"))
        check_choice("significance", self.significance, ("received", "class"))
        check_switch("class_query", self.class_query)
        if self.significance == "class":
            self.set_needs("cls_attention")
        elif self.class_query:
            self.set_needs("received_attention")

    @property
    def reads_class_attention(self) -> bool:
        return self.significance == "class"

    @property
    def needs_grid(self) -> bool:
        return self.strategy == "row"

    def importance(self, visual: VisualTokens) -> Tensor:
        if self.significance == "class":
            return torch.stack(visual.extra("cls_attention"))
        received = torch.stack(visual.extra("received_attention"))
        if self.class_query or not visual.class_token:
            return received
        # The mean over all queries, less the class token's.
        of_class, queries = torch.stack(visual.extra("cls_attention")), received.shape[1] + 1
        return (received * queries - of_class) / (queries - 1)

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        assert importance is not None
        if self.strategy == "rank":
            return top_k(importance, counts, valid=visual.valid)
        rows = []
        for tile, count in enumerate(counts.tolist()):
            tokens = selectable(visual.projected, visual.valid, tile)
            rows.append(tokens[_by_rows(importance[tile, tokens], tokens, visual.grid)[:count]])
        return unscored(rows)


def _by_rows(scores: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """LongTensor [n]: tokens of the best row first, inside a row the best token first."""
    row = tokens // grid[1]
    sums = scores.new_zeros(grid[0]).index_add(0, row, scores)
    means = sums / torch.bincount(row, minlength=grid[0]).clamp(min=1)
    rank = means.argsort(descending=True, stable=True).argsort()
    order = scores.argsort(descending=True, stable=True)
    return order[rank[row[order]].argsort(stable=True)]
