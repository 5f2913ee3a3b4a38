"""SCOPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, check_choice, check_number
from llava.pruning.registry import register
from llava.pruning.selection.max_min import cosine, first_argmax, selectable
from llava.pruning.selection.rows import Picks, joined
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
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

    name: ClassVar[str] = "scope"
    signal: ClassVar[str] = "coverage gain x class attention"
    paper: ClassVar[str] = "NeurIPS 2025, arXiv 2510.24214"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")
    shares_budget: ClassVar[bool] = True
    fidelity: ClassVar[str] = "golden"

    alpha: float = 1.0
    combine: str = "multiply"
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0)
        check_choice("combine", self.combine, ("multiply", "sum"))
        check_choice("precision", self.precision, ("float32", "model"))

    def importance(self, visual: VisualTokens) -> Tensor:
        return torch.stack(visual.extra("cls_attention"))

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        assert importance is not None
        dtype = visual.features.dtype
        if self.precision == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        rows = []
        for row, count in enumerate(counts.tolist()):
            tokens = selectable(importance, visual.valid, row)
            similarity = cosine(visual.features[row, tokens].to(dtype))
            saliency = importance[row, tokens].to(dtype) ** self.alpha
            picks = self.cover(similarity, saliency, count)
            rows.append(Picks(tokens[picks.indices], picks.margins))
        return joined(rows)

    def cover(self, similarity: Tensor, saliency: Tensor, count: int) -> Picks:
        """Positions [count] of the greedy picks and their margins."""
        covered = similarity.new_zeros(len(similarity))
        taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
        picks, margins = [], []
        added = torch.empty_like(similarity)  # fresh memory of this size costs more than the sums
        for _ in range(count):
            # S is symmetric, so rows serve as columns and are read in one piece.
            torch.sub(similarity, covered, out=added)
            gain = added.clamp_min_(0).sum(dim=1)
            score = gain * saliency if self.combine == "multiply" else gain + saliency
            score = score.masked_fill(taken, -torch.inf)
            pick = first_argmax(score)
            taken = taken.scatter(0, pick[None], True)
            margins.append(score[pick] - score.masked_fill(taken, -torch.inf).amax())
            picks.append(pick)
            covered = torch.maximum(covered, similarity[pick])
        if not picks:
            return Picks(taken.new_empty(0, dtype=torch.long), covered[:0])
        return Picks(torch.stack(picks), torch.stack(margins))
