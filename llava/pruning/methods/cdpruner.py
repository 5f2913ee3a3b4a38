"""CDPruner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.relevance import spread_out, text_relevance
from llava.pruning.method import (
    Merged,
    SimilarityMethod,
    check_choice,
    check_switch,
    listed,
    raster_order,
)
from llava.pruning.registry import register
from llava.pruning.selection.dpp import dpp
from llava.pruning.selection.rows import Picks, unscored
from llava.pruning.tokens import VisualTokens

RELEVANCES = ("auto", "clip", "none")
CLIP = ("clip_image", "clip_text")
SIGNS = ("negative", "positive")
SCOPES = ("image", "tile")
TOKENS = ("features", "projected")


@register
@dataclass(frozen=True)
class CDPruner(SimilarityMethod):
    """Keep the tokens that span the most: diverse, and more of them where the instruction points.

    Paper: CDPruner, NeurIPS 2025, arXiv 2506.10967.

        q_i   = mean_m -cos(image token i, text segment m)       (both as CLIP embeds them)
        r     = (q - min q + 1e-6) / (max q - min q)
        L     = diag(r) S diag(r),  S_ij = cos(x_i, x_j)
        kept    greedy MAP of the determinantal point process with kernel L

    The sign is negative on purpose: CLIP's patches are less similar to a text that speaks of them.
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

    name: ClassVar[str] = "cdpruner"
    signal: ClassVar[str] = "determinant of relevance x cosine"
    paper: ClassVar[str] = "NeurIPS 2025, arXiv 2506.10967"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    wants: ClassVar[tuple[str, ...]] = CLIP
    query_aware: ClassVar[bool] = True
    fidelity: ClassVar[str] = "golden"

    relevance: str = "auto"
    relevance_sign: str = "negative"
    minmax_scope: str = "image"
    tokens: str = "features"
    theta: float | None = None
    rank_guard: bool = True

    def __post_init__(self) -> None:
        check_choice("relevance", self.relevance, RELEVANCES)
        check_choice("relevance_sign", self.relevance_sign, SIGNS)
        check_choice("minmax_scope", self.minmax_scope, SCOPES)
        check_choice("tokens", self.tokens, TOKENS)
        check_switch("rank_guard", self.rank_guard)
        if not self.rank_guard:
            self.set_merges()
            object.__setattr__(self, "fixed_count", False)
        if self.theta is not None:
            real = isinstance(self.theta, int | float) and not isinstance(self.theta, bool)
            if not real or not 0 <= self.theta < 1:
                raise PruningError(f"theta must be in [0, 1) or None, got {self.theta!r}")
        features = ("features",) if self.tokens == "features" else ()
        clip = CLIP if self.relevance == "clip" else ()
        self.set_needs(*features, *clip, wants=CLIP if self.relevance == "auto" else ())

    def label(self, visual: VisualTokens) -> str:
        return f"{self.name}(relevance=none)" if self._blind(visual) else self.name

    def _blind(self, visual: VisualTokens) -> bool:
        """Whether no instruction is read."""
        absent = self.relevance == "auto" and "clip_text" not in visual.extras
        return absent or self.relevance == "none"

    def compared(self, visual: VisualTokens) -> Tensor:
        return visual.features if self.tokens == "features" else visual.projected

    def importance(self, visual: VisualTokens) -> Tensor | None:
        if self._blind(visual):
            return None
        tiles, texts = visual.extra("clip_image"), visual.extra("clip_text")
        sign = -1 if self.relevance_sign == "negative" else 1
        owners = visual.image_index
        scores = [
            sign * text_relevance(tile, texts[image])
            for tile, image in zip(tiles, owners.tolist(), strict=True)
        ]
        groups = owners if self.minmax_scope == "image" else torch.arange(len(scores))
        r = spread_out(torch.stack(scores), groups, visual.valid)
        return r if self.theta is None else (self.theta / (2 * (1 - self.theta)) * r).exp()

    def choose_among(
        self,
        z: Tensor,
        importance: Tensor | None,
        counts: Tensor,
        *,
        valid: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Picks:
        if importance is not None and factor is not None:
            importance = importance * factor
        quality = factor if importance is None else importance
        return dpp(z, counts, quality=quality, valid=valid, rank_guard=self.rank_guard)

    def adapt(self, visual: VisualTokens, counts: list[int]) -> list[int]:
        """Without the guard, the number of different tokens among the picks."""
        if self.rank_guard:
            return counts
        picks = self._unguarded(visual)
        return [len(set(row[:count])) for row, count in zip(picks, counts, strict=True)]

    def merge(self, visual: VisualTokens, counts: Tensor) -> Merged:
        # The first so many different ones, in raster order.
        rows = [
            torch.tensor(list(dict.fromkeys(row))[:count])
            for row, count in zip(self._unguarded(visual), counts.tolist(), strict=True)
        ]
        picks = unscored(rows).indices.to(visual.projected.device)
        return listed(visual, raster_order(picks))

    @torch.no_grad()
    def _unguarded(self, visual: VisualTokens) -> list[list[int]]:
        """As many picks as every tile has tokens: both callers have to see the same noise."""
        sizes = torch.tensor(visual.tile_sizes())
        picks = self.choose(visual, self.importance(visual), sizes).indices.tolist()
        return [row[:size] for row, size in zip(picks, sizes.tolist(), strict=True)]
