"""BTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.decoder.method import (
    DecoderMethod,
    Schedule,
    Stage,
    attention_to_images,
    option,
    register,
)
from llava.pruning.decoder.schedule import at_depth, between, check_layers, merged_stages, solve
from llava.pruning.decoder.spread import cells_of, farthest, spread_over
from llava.pruning.decoder.stages import RELEASED, Stages, read_stages
from llava.pruning.errors import PruningError
from llava.pruning.late_checks import refuse_if
from llava.pruning.options import varies
from llava.pruning.precision import widen
from llava.pruning.selection.max_min import cosine, max_min
from llava.pruning.selection.rows import ranking


class Composition(NamedTuple):
    """What the tokens that stay at a cut are made up of.

    Attributes:
        diverse: share of them taken for diversity.
        attended: share taken for attention.
        over: how many times as many are looked at for attention.
        spread: share taken evenly over the image.
    """

    diverse: float
    attended: float
    over: float
    spread: float = 0.0


# Of the first, the second and all later cuts.
COMPOSITIONS = (Composition(0.3, 0.3, 3.7, 0.5), Composition(0.1, 0.9, 1.5), Composition(0, 1, 1.2))


@register
class BTP(DecoderMethod):
    """Drop tokens four times: first for diversity, later more and more for attention.

    Paper: "Balanced Token Pruning: Accelerating Vision Language Models Beyond Local Optimization",
    NeurIPS 2025, arXiv 2505.22038.

    Of the k tokens that stay at a cut

        first:   k / 2 spread over the image by Manhattan distance, int(.3 k) by diversity and
                 int(.3 k) by attention (looked at: 3.7 times as many)
        second:  int(.1 k) by diversity, int(.9 k) by attention (1.5 times)
        later:   all by attention (1.2 times)

    Attention is that of the prompt's last token in the layer before, mean over heads. Of the
    tokens looked at, those before `split` come first, because attention favours late tokens: "k",
    as released, the number that stays; "half", as in the paper, half of those there are. They
    differ in the third cut alone. Diversity is DivPrune's rule on the hidden states before the cut.
    What is chosen twice leaves room, filled by the tokens farthest from all chosen ones; where more
    than k are chosen, the last ones for diversity are not.

    Released schedule: 288, 144, 48 and 0 of 576 tokens before layers 3, 6, 14 and 22 of 32 (from
    0), a mean of 129; the 98 % that the paper reports "at 128 tokens" is of this schedule, not of a
    budget of 128. With a budget all counts move between none, these, and all. For other models
    `llava calibrate` finds layers and shares, given as `stages`.

    `dedupe=False` keeps the set that the released program keeps at the second cut: it does not
    notice tokens chosen twice, so fewer than k differ. That it also feeds those tokens twice is not
    repeated.

    Options: split; dedupe; layers, before which tokens are dropped, and ratios, shares of the
    image's tokens that stay at each; stages, a file with both.
    """

    name = "btp"
    signal = "diversity, then attention of the last prompt token"
    paper = "arXiv 2505.22038, NeurIPS 2025"
    fidelity = "vectors"

    split: str = option("k", choices=("k", "half"))
    dedupe: bool = option(True)
    layers: tuple[int, ...] | None = option(None, at_least=1)
    ratios: tuple[float, ...] | None = option(None, at_least=0, at_most=1)
    stages: str | None = option(None)
    _stages: Stages = field(init=False, repr=False, compare=False, default=RELEASED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            if self.layers is not None or self.ratios is not None:
                raise PruningError("give stages, or layers and ratios, not both")
            object.__setattr__(self, "_stages", read_stages(self.stages))

    @varies(True)
    def fixed_count(self) -> bool:
        return self.dedupe

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.stages is None else (self.stages,)

    def check_budget(self, given: bool) -> None:
        if given and self.ratios is not None:
            raise PruningError("give a budget or ratios, not both: each says how many tokens stay")
        layers = self._stages.layers if self.layers is None else self.layers
        ratios = self._stages.keep if self.ratios is None else self.ratios
        if len(layers) != len(ratios):
            raise PruningError(
                f"{len(layers)} layers {[*layers]} need as many ratios, got {[*ratios]}"
            )

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        layers = self._cuts(depth)
        keep = self._stages.keep if self.ratios is None else self.ratios

        def sharing(shares: Sequence[float]) -> Schedule:
            return merged_stages(layers, [round(tokens * share) for share in shares])

        if budget is None:
            return sharing(keep)
        steps = [[0.0] * len(keep), keep, [1.0] * len(keep)]
        return solve(tokens, depth, budget, lambda at: sharing(between(steps, at)), self.name)

    def _cuts(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return check_layers(self.layers, depth)
        if self.stages is not None:
            return check_layers(self._stages.layers, depth)
        return at_depth(self._stages.layers, depth)

    def score(self, stage: Stage) -> Tensor:
        return attention_to_images(stage)

    def select(self, stage: Stage, scores: Tensor, counts: Sequence[int]) -> Tensor:
        cuts = self._cuts(len(stage.decoder.layers))
        number = max(place for place, layer in enumerate(cuts) if layer == stage.layer)
        composition = COMPOSITIONS[min(number, len(COMPOSITIONS) - 1)]
        hidden = stage.of_images(stage.hidden)
        picks = []
        for image, (left, count) in enumerate(zip(stage.counts, counts, strict=True)):
            if count in (0, left):
                picks.append(torch.arange(count, device=scores.device))
                continue
            cells = hidden.new_empty(0)
            if composition.spread:
                cells = cells_of(stage.images[image], stage.place[image, :left])
            own, attended = hidden[image, :left], scores[image, :left]
            split = count if self.split == "k" else left // 2
            picks.append(
                balanced(composition, own, attended, cells, count, split, dedupe=self.dedupe)
            )
        return pad_sequence(picks, batch_first=True, padding_value=-1)


def balanced(
    composition: Composition,
    hidden: Tensor,
    scores: Tensor,
    cells: Tensor,
    count: int,
    split: int,
    dedupe: bool = True,
) -> Tensor:
    """Choose what stays of one image at one cut.

    Args:
        composition: what it is made up of.
        hidden: [N, D], before the cut.
        scores: [N], attention.
        cells: [N, 3] of `cells_of`; read where some are spread over the image.
        count: how many stay, below N.
        split: see `attended_first`.
        dedupe: False for fewer where the second cut chooses tokens twice.

    Returns:
        LongTensor of at most `count` indices, all different.
    """
    spread, attended = int(composition.spread * count), int(composition.attended * count)
    diverse = int(composition.diverse * count)
    parts = [attended_first(scores, attended, int(attended * composition.over), split)]
    if spread:
        parts.insert(0, spread_over(cells, spread))
    if diverse:
        parts.append(max_min(hidden[None], diverse, first="isolated")[0])
    chosen = torch.cat(parts)
    order = torch.arange(len(chosen), device=chosen.device)
    unseen = torch.full((len(hidden),), len(chosen), device=chosen.device)
    first = unseen.scatter_reduce(0, chosen, order, "amin")
    taken = first < len(chosen)
    ordered = first.argsort(stable=True)[: int(taken.sum())]
    repeated = not dedupe and not spread
    room = count - (len(chosen) if repeated else len(ordered))
    if room <= 0:
        return ordered[:count]
    distances = 1 - cosine(widen(hidden).contiguous())
    return torch.cat([ordered, farthest(distances, taken, room)])


def attended_first(scores: Tensor, count: int, extra: int, split: int) -> Tensor:
    """Take `count` of the `extra` highest scores [N], those before index `split` first.

    Returns:
        LongTensor [count], by descending score before `split`, then by descending score.

    Raises:
        PruningError: a score is NaN.
    """
    refuse_if(
        scores.device,
        scores.isnan,
        lambda: PruningError("attention is NaN; there is no highest"),
    )
    highest = ranking(scores[None])[0, :extra]
    late = (highest >= split).byte().argsort(stable=True)
    return highest[late][:count]
