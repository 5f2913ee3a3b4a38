"""FoPru."""

import torch
from torch import Tensor

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register, varies


@register
class FoPru(PruningMethod):
    """Keep the patches, or the rows of patches, that the vision tower attends to most.

    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164.

        significance   s_j, attention received by patch j in the block that makes the features
        rank           the k highest s
        row            whole rows of the grid by their mean s, best first
        reordering     raster order

    Reconstructed: no code is public and the formula of s was not available to us. Here s is the
    mean over heads and over the patches' queries, `significance="received"`; "class" takes the
    class token's query instead, which is FasterVLM. A budget that ends inside a row is filled up
    with that row's best patches, so that k tokens stay k tokens; the paper's rounding is open.

    Options: strategy `rank` | `row`; significance `received` | `class`; class_query, whether the
    class token counts among the queries of "received". A tower without one gives "received" for
    both, and the trace says so of "class".
    """

    name = "fopru"
    signal = "attention received"
    paper = "arXiv 2411.14164"
    fidelity = "reconstructed"

    strategy: str = option("rank", choices=("rank", "row"))
    significance: str = option("received", choices=("received", "class"))
    class_query: bool = option(False)

    @varies(("cls_attention", "received_attention"))
    def needs(self) -> tuple[str, ...]:
        received = () if self.significance == "class" else ("received_attention",)
        return received if received and self.class_query else ("cls_attention", *received)

    @varies(False)
    def needs_grid(self) -> bool:
        return self.strategy == "row"

    def label(self, tokens: VisualTokens) -> str:
        return super().label(tokens) if self.significance == "class" else self.name

    def score(self, tokens: VisualTokens) -> Tensor:
        if self.significance == "class":
            return torch.stack(tokens.extra("cls_attention"))
        received = torch.stack(tokens.extra("received_attention"))
        if self.class_query or not tokens.class_token:
            return received
        # The mean over all queries, less the class token's.
        of_class, queries = torch.stack(tokens.extra("cls_attention")), received.shape[1] + 1
        return (received * queries - of_class) / (queries - 1)

    def select(self, rows: Rows) -> Picks:
        return rows.highest() if self.strategy == "rank" else super().select(rows)

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        lines, columns = rows.tokens.grid
        order = _by_rows(rows.scored[row, tokens], tokens // columns, lines)
        return tokens[order[:count]]


def _by_rows(scores: Tensor, row: Tensor, lines: int) -> Tensor:
    """Return the order of tokens, LongTensor [n]: the best row first, in it the best token first.

    Args:
        scores: [n].
        row: LongTensor [n], the row of the grid that each token is in.
        lines: rows of the grid.
    """
    if scores.device.type == "cpu":
        sums = scores.new_zeros(lines).index_add(0, row, scores)
        sizes = torch.bincount(row, minlength=lines)
    else:  # index_add sums in any order there, bincount waits
        inside = row == torch.arange(lines, device=row.device)[:, None]
        sums, sizes = torch.where(inside, scores, 0).sum(dim=1), inside.sum(dim=1)
    means = sums / sizes.clamp(min=1)
    # A row of nothing but padding has no tokens to place.
    rank = means.argsort(descending=True, stable=True).argsort()
    order = scores.argsort(descending=True, stable=True)
    return order[rank[row[order]].argsort(stable=True)]
