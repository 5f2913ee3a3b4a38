"""DivPrune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.method import (
    Merged,
    SimilarityMethod,
    check_choice,
    check_switch,
    listed,
    raster_order,
)
from llava.pruning.registry import register
from llava.pruning.selection.max_min import max_min_with_margins
from llava.pruning.selection.rows import Picks
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class DivPrune(SimilarityMethod):
    """Keep the tokens that differ most from each other; nothing else counts.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
    arXiv 2503.02175.

        D_ij = 1 - cos(Z_i, Z_j)
        first pick  argmax_i min_{j != i} D_ij              (the most isolated token)
        then        argmax_i min_{j in P} D_ij, until |P| = k

    Where the released code differs: it works in the model's half precision, can pick a token twice
    when fewer than k are distinct, and reads only the first image of a batch. Here: float32, never
    twice, every image. Both emit the kept tokens in raster order; the paper's figures were made
    with tokens in the order of picks, as its authors say.

    LLaVA-1.6: the released code chooses once among all tokens of an image, newlines included, as
    `allocation="global", newline="select"` does here; by default every tile has its share.

    Options, all for comparison with those: precision `float32` | `model`; mask_selected, false for
    picks that may repeat, so that a token is fed several times; emit_order `raster` | `selection`.
    """

    name: ClassVar[str] = "divprune"
    signal: ClassVar[str] = "max-min cosine distance"
    paper: ClassVar[str] = "CVPR 2025, arXiv 2503.02175"
    fidelity: ClassVar[str] = "golden"

    precision: str = "float32"
    mask_selected: bool = True
    emit_order: str = "raster"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("float32", "model"))
        check_switch("mask_selected", self.mask_selected)
        check_choice("emit_order", self.emit_order, ("raster", "selection"))
        if not self.mask_selected or self.emit_order == "selection":
            self.set_merges()

    def merge(self, visual: VisualTokens, counts: Tensor) -> Merged:
        picks = self.choose(visual, None, counts).indices
        return listed(visual, picks if self.emit_order == "selection" else raster_order(picks))

    def choose_among(
        self,
        z: Tensor,
        importance: Tensor | None,
        counts: Tensor,
        *,
        valid: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Picks:
        return max_min_with_margins(
            *(z, counts),
            weights=factor,
            valid=valid,
            first="isolated",
            precision=self.precision,
            mask_selected=self.mask_selected,
        )
