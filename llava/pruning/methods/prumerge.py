"""LLaVA-PruMerge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from llava.pruning.method import (
    Merged,
    PruningMethod,
    check_choice,
    check_switch,
    check_whole,
    stack_merged,
)
from llava.pruning.registry import register
from llava.pruning.selection.max_min import selectable
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class PruMerge(PruningMethod):
    """Keep what the class token looks at, each with its neighbours, and one token of the rest.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    ICCV 2025, arXiv 2403.15388. q, K of the block **after** the features:

        a       softmax(q_class K^T / sqrt(C)), all heads taken for one
        kept    the k - 1 highest a
        merged  x_i + sum of a_j x_j over the 32 tokens j whose keys are most similar to i's
        rest    sum of a_j x_j over all tokens that are not kept: the last token

    The method adapts its count to the image; a budget is this project's addition, as for everyone
    who reports it at 64 or 128 tokens. `adaptive=true` is the published rule: as many patches as
    have a > Q3 + 1.5 (Q3 - Q1), at least one, plus the rest token; the budget is then a ceiling and
    counts differ from image to image. The released code takes the quartiles over a whole batch,
    here over a tile.

    Options: neighbours 32; merge_norm divides what is merged by its weights, the token itself
    weighing a_i, so that norms stay those of features (the released code does not divide);
    emit_order `attention` (highest first, as released) or `raster`; single_head false takes that
    block's real attention, mean over heads.
    """

    name: ClassVar[str] = "prumerge"
    signal: ClassVar[str] = "class attention, key similarity"
    paper: ClassVar[str] = "ICCV 2025, arXiv 2403.15388"
    needs: ClassVar[tuple[str, ...]] = (
        *("features", "projector"),
        *("next_single_head_attention", "next_cls_attention", "next_keys"),
    )
    merges: ClassVar[bool] = True
    fidelity: ClassVar[str] = "golden"

    neighbours: int = 32
    adaptive: bool = False
    merge_norm: bool = False
    emit_order: str = "attention"
    single_head: bool = True

    def __post_init__(self) -> None:
        check_whole("neighbours", self.neighbours, at_least=0)
        for name in ("adaptive", "merge_norm", "single_head"):
            check_switch(name, getattr(self, name))
        check_choice("emit_order", self.emit_order, ("attention", "raster"))
        if self.adaptive:
            object.__setattr__(self, "fixed_count", False)
        unread = "next_cls_attention" if self.single_head else "next_single_head_attention"
        self.set_needs(*(need for need in type(self).needs if need != unread))

    def adapt(self, visual: VisualTokens, counts: list[int]) -> list[int]:
        if not self.adaptive:
            return counts
        adapted = []
        for tile, ceiling in enumerate(counts):
            attention = self._attention(visual, tile)
            attended = outliers(attention)
            samples = self._adaptive_samples(attention, attended)
            adapted.append(min(ceiling, attended + len(samples) + 1))
        return adapted

    def merge(self, visual: VisualTokens, counts: Tensor) -> Merged:
        merged = stack_merged([self._tile(visual, t, k - 1) for t, k in enumerate(counts.tolist())])
        return merged if self.emit_order == "raster" else merged._replace(places=None)

    def _attention(self, visual: VisualTokens, tile: int) -> Tensor:
        """[n] of the tile's valid tokens; of one head or a mean over heads, so at most 1 in all."""
        tokens = selectable(visual.projected, visual.valid, tile)
        if self.single_head:
            return visual.extra("next_single_head_attention")[tile][tokens]
        return visual.extra("next_cls_attention")[tile][tokens]

    def _choose(self, attention: Tensor, count: int) -> Tensor:
        """LongTensor [count] among n tokens, in the order they are emitted."""
        return attention.argsort(descending=True, stable=True)[:count]

    def _adaptive_samples(self, attention: Tensor, attended: int) -> Tensor:
        """Tokens taken besides the `attended` most attended ones."""
        return attention.new_empty(0, dtype=torch.long)

    def _tile(self, visual: VisualTokens, tile: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projected tokens [K, D], their sources [K, N] and places [K]."""
        tokens = selectable(visual.projected, visual.valid, tile)
        with torch.no_grad():
            attention = self._attention(visual, tile)
            kept = self._choose(attention, count)
            if self.emit_order == "raster":
                kept = kept.sort().values
            weights = self._weights(attention, visual.extra("next_keys")[tile][tokens], kept)
        x = visual.features[tile, tokens]
        made = (weights @ x.to(weights.dtype)).to(x.dtype)
        new = visual.projector(made).to(visual.projected.dtype)
        sources = torch.zeros(
            len(new), visual.projected.shape[1], dtype=torch.bool, device=x.device
        )
        sources[:, tokens] = weights != 0
        return new, sources, pad(tokens[kept], (0, 1), value=-1)

    def _weights(self, attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        """[k, n]: how much of every token goes into each kept one, and into the rest."""
        free = torch.ones_like(attention, dtype=torch.bool)
        free[kept] = False
        others = free.nonzero().flatten()
        pool, place = torch.arange(len(attention), device=kept.device), kept
        repeats = len(kept) - len(kept.unique())
        if repeats:
            # PruMerge+'s released split keeps tokens twice. Each is then a neighbour of its double,
            # and as many of the first others are lost.
            others = others[repeats:]
            pool = torch.cat([others, kept])
            place = torch.arange(len(others), len(pool), device=kept.device)
        row = torch.arange(len(kept), device=kept.device)
        unit = normalize(keys, dim=-1)
        similarity = unit[kept] @ unit[pool].T
        similarity[row, place] = -torch.inf
        near = min(self.neighbours, len(pool) - 1)
        order = pool[similarity.argsort(dim=1, descending=True, stable=True)[:, :near]]
        weights = attention.new_zeros(len(kept), len(attention))
        weights = weights.scatter_add(1, order, attention[order])
        weights[row, kept] += attention[kept] if self.merge_norm else 1
        rest = torch.zeros_like(attention).scatter(0, others, attention[others])
        weights = torch.cat([weights, rest[None]])
        return weights / weights.sum(dim=1, keepdim=True) if self.merge_norm else weights


def outliers(attention: Tensor) -> int:
    """How many of `attention` [n] lie above Q3 + 1.5 (Q3 - Q1), at least one."""
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75])).tolist()
    return max(1, int((attention > high + 1.5 * (high - low)).sum()))
