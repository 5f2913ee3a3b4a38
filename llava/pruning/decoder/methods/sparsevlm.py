"""SparseVLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.decoder.clusters import merge_clusters
from llava.pruning.decoder.columns import TEXT, VisualColumns
from llava.pruning.decoder.layers import Rotary, take_columns
from llava.pruning.decoder.method import (
    DecoderMethod,
    Made,
    Schedule,
    Stage,
    option,
    register,
)
from llava.pruning.decoder.schedule import at_depth, between, check_layers, solve
from llava.pruning.errors import PruningError
from llava.pruning.options import varies
from llava.pruning.precision import widen
from llava.pruning.selection.rows import ranking

# Tokens of 576 that stay at the three cuts, by the name of the budget.
_LISTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "v1": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "v2": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
_TOKENS = 576
# The released program prunes what layers 2, 6 and 15 of 32 put out.
_LAYERS = (3, 7, 16)
_HEADS = 14


class _Raters(NamedTuple):
    """Tokens of text that rate: which of their row's, LongTensor [B, Q], and `present` [B, Q]."""

    numbers: Tensor
    present: Tensor


@register
class SparseVLM(DecoderMethod):
    """Drop tokens three times, by what the question's telling words attend to.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    ICML 2025, arXiv 2410.04417.

        raters: text t behind the images whose mean over visual v of softmax_t(v . t), of input
            embeddings without any scaling, is above the average
        s_j = mean over heads and raters of A[t, j] in the last layer before the cut
        the k tokens with the highest s stay

    Version v1 recycles: of the n tokens dropped the int(.3 n) + 1 = m best are merged to
    int(m / 10) + 1 clusters (see `merge_clusters`), which stand behind the tokens that stay;
    positions start again from 0 without gaps. The density noise of the released program is drawn
    from `seed` and m alone. Version v2 merges nothing and keeps positions; it divides A by its
    "gravity", the product of the rotated all-ones query and key over sqrt(d), sign and all, and
    averages the 14 heads whose sums are highest.

    The paper's adaptive counts were never released: schedules are fixed, and published for 192,
    128, 96 and 64 of 576 tokens. These names count a layer by what it puts out; really processed
    are 206.5, 145.4, 114.1 and 82.2 a layer. `schedule="official"` takes the list of that name
    (of other than 576 tokens, of the same share). "solved" puts the budget between the published
    lists so that the mean over layers, recycled tokens counted, is what was asked for.

    A prompt with several images has the same raters for all; each is cut for itself. Where k tokens
    or fewer are there, "solved" drops none; "official" and `keep` drop one, as the released program
    does.

    Options: version; schedule; layers, before which tokens are dropped: one more than those that
    the released program names; keep, how many stay at each, in place of a budget; heads of v2;
    noise and seed of the clusters.
    """

    name = "sparsevlm"
    signal = "attention of telling words"
    paper = "arXiv 2410.04417, ICML 2025"
    fidelity = "golden"

    version: str = option("v1", choices=tuple(_LISTS))
    schedule: str = option("solved", choices=("solved", "official"))
    layers: tuple[int, ...] | None = option(None, at_least=1)
    keep: tuple[int, ...] | None = option(None, at_least=0)
    heads: int | None = option(None, at_least=1)
    noise: float = option(1e-6, at_least=0)
    seed: int = option(0, at_least=0, below=2**32)

    @property
    def _as_released(self) -> bool:
        """Whether every cut drops a token at least."""
        return self.keep is not None or self.schedule == "official"

    @varies("compact")
    def positions(self) -> str:
        return "compact" if self.version == "v1" else "original"

    @varies(True)
    def budgeted(self) -> bool:
        return self.keep is None

    def check_budget(self, given: bool) -> None:
        if given and self.keep is not None:
            raise PruningError("give a budget or keep, not both: each says how many tokens stay")
        layers = _LAYERS if self.layers is None else self.layers
        cuts = len(_LAYERS) if self.keep is None else len(self.keep)
        if len(layers) != cuts:
            raise PruningError(
                f"{len(layers)} layers {[*layers]} for {cuts} counts of tokens; give as many"
            )
        if self.heads is not None and self.version == "v1":
            raise PruningError("heads is an option of version='v2'; version v1 averages all")

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        layers = at_depth(_LAYERS, depth)
        if self.layers is not None:
            layers = check_layers(self.layers, depth)
        if self.keep is not None:
            return self._scheduled(tokens, layers, self.keep)
        assert budget is not None

        def sharing(shares: Sequence[float]) -> Schedule:
            return self._scheduled(tokens, layers, [round(tokens * share) for share in shares])

        published = {
            name: [count / _TOKENS for count in counts]
            for name, counts in _LISTS[self.version].items()
        }
        if self.schedule == "official":
            name = _name_of(budget, tokens)
            return sharing(published[name])
        steps = [[0.0] * 3, *published.values(), [1.0] * 3]
        return solve(tokens, depth, budget, lambda at: sharing(between(steps, at)), self.name)

    def _scheduled(self, tokens: int, layers: Sequence[int], keep: Sequence[int]) -> Schedule:
        """Return the cuts that drop anything; of several at one layer the last counts."""
        cuts, kept, made, left = [], [], [], tokens
        for layer, count in dict(zip(layers, keep, strict=True)).items():
            count = min(count, max(left - 1, 0)) if self._as_released else count
            if count >= left:
                continue
            cuts.append(layer)
            kept.append(count)
            made.append(0 if self.version == "v2" else _recycled(left - count)[1])
            left = count + made[-1]
        return Schedule(tuple(cuts), tuple(kept), tuple(made))

    def relabel(self, columns: VisualColumns) -> VisualColumns:
        at = torch.arange(1, columns.width + 1)
        visual, text = columns.image >= 0, columns.image == TEXT
        if ((at * visual).amax(dim=1) > (at * text).amax(dim=1)).any():
            raise PruningError(
                "sparsevlm drops tokens by the text behind the last image of a prompt, and there "
                "is none; put the question behind the image, or take another method"
            )
        return columns

    def begin(self, stage: Stage) -> _Raters:
        visual = stage.valid & ~stage.text
        behind = stage.text & (visual.flip(1).cumsum(dim=1).flip(1) == 0)
        numbers = []
        for row, embeddings in enumerate(stage.hidden):
            rated = rate_text(embeddings[visual[row]], embeddings[behind[row]])
            tells = rated > rated.mean()
            tells = tells if tells.any() else torch.ones_like(tells)
            before = stage.text[row].sum() - behind[row].sum()
            numbers.append(before + tells.nonzero()[:, 0])
        padded = pad_sequence(numbers, batch_first=True, padding_value=-1)
        return _Raters(padded.clamp(min=0), padded >= 0)

    def score(self, stage: Stage) -> Tensor:
        raters = _Raters(*(part.to(stage.hidden.device) for part in stage.memory))
        # Text is never dropped, so its tokens keep their numbers.
        texts = stage.text.byte().argsort(dim=1, descending=True, stable=True)
        queries = texts.gather(1, raters.numbers)
        attention = stage.attention(queries)
        if self.version == "v2":
            attention = attention / gravity(stage.rotary, queries)[:, None]
        own = stage.of_images(attention.permute(0, 3, 1, 2))  # [I, N, H, Q]
        present = raters.present[stage.rows][:, None, None]
        rated = own.masked_fill(~(present & stage.present[..., None, None]), 0).sum(dim=3)
        rated = rated / present.sum(dim=3)
        if self.version == "v2":
            best = self._best_heads(rated.sum(dim=1))
            rated = rated.gather(2, best[:, None].expand(-1, rated.shape[1], -1))
        return rated.mean(dim=2)

    def _best_heads(self, sums: Tensor) -> Tensor:
        """Return the heads [I, heads] with the highest sums [I, H]."""
        heads = _HEADS if self.heads is None else self.heads
        if heads > sums.shape[1]:
            raise PruningError(
                f"sparsevlm version='v2' averages {heads} heads, and this language model has "
                f"{sums.shape[1]}; give heads={max(1, sums.shape[1] // 2)}"
            )
        return ranking(sums)[:, :heads]

    def make(self, stage: Stage, scores: Tensor, kept: Tensor) -> Made | None:
        if self.version == "v2":
            return None
        dropped = [left - own for left, own in zip(stage.counts, kept.sum(1).tolist(), strict=True)]
        order = ranking(scores, stage.present & ~kept)
        hidden = stage.of_images(stage.hidden)
        made = []
        for image, count in enumerate(dropped):
            recycled, clusters = _recycled(count)
            tokens = hidden[image, order[image, :recycled]]
            made.append(
                merge_clusters(tokens, clusters, self._drawn(recycled)) if count else tokens
            )
        return Made(pad_sequence(made, batch_first=True), [len(tokens) for tokens in made])

    def _drawn(self, count: int) -> Tensor | None:
        if self.noise == 0:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + count)
        return self.noise * torch.rand(count, generator=generator, dtype=torch.float64)


def rate_text(visual: Tensor, text: Tensor) -> Tensor:
    """Return how much text [T, D] tells of visual tokens [N, D]: at least float32 [T].

    The mean over visual v of softmax over t of v . t, of input embeddings.
    """
    return (widen(visual) @ widen(text).T).softmax(dim=1).mean(dim=0)


def gravity(rotary: Rotary, queries: Tensor) -> Tensor:
    """Return what rotation alone gives columns [B, Q] for all S: [B, Q, S], of any sign.

    The product of an all-ones query and an all-ones key, rotated, over sqrt(d).
    """
    cos, sin = (widen(part) for part in rotary)
    half = cos.shape[-1] // 2
    ones = torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], dim=-1)
    ones = ones.expand(len(queries), *ones.shape[1:])
    return take_columns(ones, queries) @ ones.mT / cos.shape[-1] ** 0.5


def _recycled(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens are recycled, and to how many clusters."""
    if dropped == 0:
        return 0, 0
    count = int(0.3 * dropped) + 1
    return count, count // 10 + 1


def _name_of(budget: float, tokens: int) -> int:
    """Return the published name of a budget of an image with `tokens` tokens.

    Raises:
        PruningError: there is no such name.
    """
    names = {round(name * tokens / _TOKENS): name for name in _LISTS["v1"]}
    if round(budget) not in names:
        raise PruningError(
            f"sparsevlm's published schedules keep {', '.join(map(str, names))} of {tokens} "
            f"tokens, got {budget:g}; take one of these, or schedule='solved'"
        )
    return names[round(budget)]
