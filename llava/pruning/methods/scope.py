"""SCOPE."""

import torch
from torch import Tensor

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register
from llava.pruning.precision import widen
from llava.pruning.selection.coverage import cover
from llava.pruning.selection.max_min import cosine


@register
class Scope(PruningMethod):
    """Greedily cover all tokens with few, salient ones first.

    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
    NeurIPS 2025, arXiv 2510.24214. S cosine similarity before the projector, A class attention
    summed over heads, c_u how well token u is covered, 0 at first:

        gain(v)     sum_u max(0, S_uv - c_u)
        pick        argmax_v gain(v) * A_v^alpha       (`combine="multiply"`, published as "multi")
                    argmax_v gain(v) + A_v^alpha       (`combine="sum"`, published as "add")
        c_u         max(c_u, S_u,pick), until k are picked

    Where the released code differs: it works in the model's precision, where half precision makes
    ties of near-equal gains (`precision="model"` does so too), and divides a budget among all
    tiles and images of one call: on LLaVA-1.6 `mm_next_protocol="spatial"` divides it among the
    tiles of an image. Its scripts use alpha 1; a note reports 0.5 as best.

    Options: alpha; combine `multiply` | `sum`; precision `float32` | `model`.
    """

    name = "scope"
    signal = "coverage gain x class attention"
    paper = "NeurIPS 2025, arXiv 2510.24214"
    needs = ("features", "cls_attention")
    shares_budget = True
    fidelity = "golden"

    alpha: float = option(1.0, at_least=0)
    combine: str = option("multiply", choices=("multiply", "sum"))
    precision: str = option("float32", choices=("float32", "model"))

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(tokens.extra("cls_attention"))

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Picks:
        x = rows.tokens.features[row, tokens]
        x = widen(x) if self.precision == "float32" else x
        saliency = rows.scored[row, tokens].to(x.dtype) ** self.alpha
        picks = self.cover(cosine(x), saliency, count)
        return Picks(tokens[picks.indices], picks.margins)

    def cover(self, similarity: Tensor, saliency: Tensor, count: int) -> Picks:
        """Return positions [count] of the greedy picks and their margins."""
        weigh = torch.mul if self.combine == "multiply" else torch.add
        # S is symmetric: transposed, its columns are read in one piece.
        return cover(similarity.T, count, score=lambda gain: weigh(gain, saliency))
