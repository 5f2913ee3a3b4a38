"""LLaVA-PruMerge."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from llava.pruning.method import Merged, PruningMethod, VisualTokens, option, register, varies
from llava.pruning.selection.rows import selectable


@register
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

    name = "prumerge"
    signal = "class attention, key similarity"
    paper = "ICCV 2025, arXiv 2403.15388"
    merges = True
    fidelity = "golden"

    neighbours: int = option(32, at_least=0)
    adaptive: bool = option(False)
    merge_norm: bool = option(False)
    emit_order: str = option("attention", choices=("attention", "raster"))
    single_head: bool = option(True)

    @varies(
        ("features", "projector", "next_single_head_attention", "next_cls_attention", "next_keys")
    )
    def needs(self) -> tuple[str, ...]:
        return ("features", "projector", self._attention_key, "next_keys")

    @varies(True)
    def fixed_count(self) -> bool:
        return not self.adaptive

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        tiles = enumerate(counts.tolist())
        merged = Merged.stack([self._merge_tile(tokens, tile, k - 1) for tile, k in tiles])
        return merged if self.emit_order == "raster" else merged._replace(places=None)

    @property
    def _attention_key(self) -> str:
        return "next_single_head_attention" if self.single_head else "next_cls_attention"

    def _choose(self, attention: Tensor, count: int) -> Tensor:
        """Pick `count` of n tokens, or fewer, LongTensor, in the order they are emitted."""
        if self.adaptive:
            count = min(count, count_outliers(attention))
        return attention.argsort(descending=True, stable=True)[:count]

    def _merge_tile(
        self, tokens: VisualTokens, tile: int, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected tokens [K, D], their sources [K, N] and places [K]."""
        own = selectable(tokens.projected, tokens.valid, tile)
        with torch.no_grad():
            # Of one head or a mean over heads, so at most 1 in all.
            attention = tokens.extra(self._attention_key)[tile][own]
            kept = self._choose(attention, count)
            if self.emit_order == "raster":
                kept = kept.sort().values
            weights = self._weights(attention, tokens.extra("next_keys")[tile][own], kept)
        x = tokens.features[tile, own]
        made = (weights @ x.to(weights.dtype)).to(x.dtype)
        new = tokens.projector(made).to(tokens.projected.dtype)
        sources = weights.new_zeros(len(new), tokens.projected.shape[1], dtype=torch.bool)
        sources[:, own] = weights != 0
        return new, sources, pad(own[kept], (0, 1), value=-1)

    def _weights(self, attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        """Return how much of every token goes into each kept one, and into the rest: [k + 1, n]."""
        others = unkept(attention, kept)
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


def count_outliers(attention: Tensor) -> int:
    """Count what of `attention` [n] lies above Q3 + 1.5 (Q3 - Q1), at least one."""
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75])).tolist()
    return max(1, int((attention > high + 1.5 * (high - low)).sum()))


def unkept(attention: Tensor, kept: Tensor) -> Tensor:
    """Return the tokens of `attention` [n] that are not in `kept`, LongTensor, ascending."""
    free = torch.ones_like(attention, dtype=torch.bool)
    free[kept] = False
    return free.nonzero().flatten()
