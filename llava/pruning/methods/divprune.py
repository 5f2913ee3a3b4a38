"""DivPrune."""

from torch import Tensor

from llava.pruning.indices import raster_order
from llava.pruning.method import (
    Merged,
    Picks,
    PruningMethod,
    Rows,
    VisualTokens,
    option,
    register,
    varies,
)
from llava.pruning.selection.max_min import max_min_with_margins


@register
class DivPrune(PruningMethod):
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

    name = "divprune"
    signal = "max-min cosine distance"
    paper = "CVPR 2025, arXiv 2503.02175"
    compares = True
    fidelity = "golden"

    precision: str = option("float32", choices=("float32", "model"))
    mask_selected: bool = option(True)
    emit_order: str = option("raster", choices=("raster", "selection"))

    @varies(False)
    def merges(self) -> bool:
        return not self.mask_selected or self.emit_order == "selection"

    def select(self, rows: Rows) -> Picks:
        return max_min_with_margins(
            rows.z,
            rows.counts,
            weights=rows.weight,
            valid=rows.valid,
            first="isolated",
            precision=self.precision,
            mask_selected=self.mask_selected,
        )

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        picks = self.select(self.rows(tokens, None, counts)).indices
        return Merged.as_picked(
            tokens,
            picks if self.emit_order == "selection" else raster_order(picks),
            counts.tolist(),
        )
