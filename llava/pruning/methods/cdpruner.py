"""CDPruner."""

import torch
from torch import Tensor

from llava.pruning.importance.normalise import spread_out
from llava.pruning.importance.similarity import text_relevance
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
from llava.pruning.selection.dpp import dpp

CLIP = ("clip_image", "clip_text")


@register
class CDPruner(PruningMethod):
    """Keep the tokens that span the most: diverse, and more of them where the instruction points.

    Paper: CDPruner, NeurIPS 2025, arXiv 2506.10967.

        q_i   = mean_m -cos(image token i, text segment m)       (both as CLIP embeds them)
        r     = (q - min q + 1e-6) / (max q - min q)
        L     = diag(r) S diag(r),  S_ij = cos(x_i, x_j)
        kept    greedy MAP of the determinantal point process with kernel L

    The sign is negative on purpose: CLIP's patches are less similar to a text that mentions them.
    `relevance=auto` is `clip` where the vision tower has a text tower and `none` elsewhere, which
    the trace then names. `relevance=none` sets r = 1, so no instruction is read: that is the
    diversity half of CDPruner alone and has to be called so in a table. Its first pick is the first
    token: alone, all span the same.

    x is the tower's output before the projector, as the released code compares it in the recorded
    runs; descriptions of the method say after the projector, which `tokens=projected` takes.

    Where the released code differs: once the budget exceeds the rank of L it takes roots of
    negative numbers and keeps fewer tokens than asked; here the remaining picks go by r, and
    `rank_guard=false` does as released: the budget is then a ceiling. It compares tokens in half
    precision; here in float32. It reads one prompt at a time.

    Options: relevance `auto` | `clip` (an error without a text tower) | `none`;
    relevance_sign `negative` (CLIP) | `positive`; minmax_scope `image`, over all its tiles as
    released, | `tile`; tokens compared, `features` before the projector as released, |
    `projected`; rank_guard; theta in [0, 1), the released r <- exp(theta / (2 - 2 theta) r), None
    for r itself.
    """

    name = "cdpruner"
    signal = "determinant of relevance x cosine"
    paper = "NeurIPS 2025, arXiv 2506.10967"
    query_aware = True
    compares = True
    fidelity = "golden"

    relevance: str = option("auto", choices=("auto", "clip", "none"))
    relevance_sign: str = option("negative", choices=("negative", "positive"))
    minmax_scope: str = option("image", choices=("image", "tile"))
    tokens: str = option("features", choices=("features", "projected"))
    theta: float | None = option(None, at_least=0, below=1)
    rank_guard: bool = option(True)

    @varies(("features",))
    def needs(self) -> tuple[str, ...]:
        features = ("features",) if self.tokens == "features" else ()
        return (*features, *CLIP) if self.relevance == "clip" else features

    @varies(CLIP)
    def wants(self) -> tuple[str, ...]:
        return CLIP if self.relevance == "auto" else ()

    @varies(False)
    def merges(self) -> bool:
        return not self.rank_guard

    @varies(True)
    def fixed_count(self) -> bool:
        return self.rank_guard

    def label(self, tokens: VisualTokens) -> str:
        return f"{self.name}(relevance=none)" if self._blind(tokens) else self.name

    def _blind(self, tokens: VisualTokens) -> bool:
        """Return whether no instruction is read."""
        absent = self.relevance == "auto" and "clip_text" not in tokens.extras
        return absent or self.relevance == "none"

    def compared(self, tokens: VisualTokens) -> Tensor:
        return tokens.features if self.tokens == "features" else tokens.projected

    def score(self, tokens: VisualTokens) -> Tensor | None:
        if self._blind(tokens):
            return None
        tiles, texts = tokens.extra("clip_image"), tokens.extra("clip_text")
        sign = -1 if self.relevance_sign == "negative" else 1
        owners = tokens.image_index
        scores = [
            sign * text_relevance(tile, texts[image])
            for tile, image in zip(tiles, owners.tolist(), strict=True)
        ]
        groups = owners if self.minmax_scope == "image" else torch.arange(len(scores))
        r = spread_out(torch.stack(scores), groups, tokens.valid)
        return r if self.theta is None else (self.theta / (2 * (1 - self.theta)) * r).exp()

    def select(self, rows: Rows) -> Picks:
        quality = rows.weight if rows.scores is None else rows.scores
        if rows.scores is not None and rows.weight is not None:
            quality = rows.scores * rows.weight
        return dpp(
            rows.z, rows.counts, quality=quality, valid=rows.valid, rank_guard=self.rank_guard
        )

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        """Return, without the guard, the different tokens among the picks, in raster order."""
        with torch.no_grad():
            picks = self.select(self.rows(tokens, self.score(tokens), counts)).indices
        different = [row.unique() for row in picks]
        kept = Picks.stack([row[row >= 0] for row in different]).indices
        return Merged.as_picked(tokens, kept)
