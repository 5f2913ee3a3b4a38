"""LLaVA-PruMerge+."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.methods.prumerge import PruMerge, outliers
from llava.pruning.registry import register


@register
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, with evenly spaced tokens beside the attended ones.

    Paper: as `prumerge`, arXiv 2403.15388. `adaptive=true` is the published rule: with a share r of
    patches attended to, every floor(floor(1 / r) / 3)-th token that is not kept yet comes too, some
    three for one. The released code stops with an error where no patch is attended to, or more than
    a third of them are; here it is at least one, and then every token comes.

    There is no published rule for a budget. Reconstructed: of k - 1 tokens a quarter, rounded up,
    is attended to, the ratio of the adaptive rule; the others lie evenly among the rest, starting
    with the first.

    Options: as `prumerge`.
    """

    name: ClassVar[str] = "prumerge-plus"
    signal: ClassVar[str] = "class attention, place, key similarity"
    equivariant: ClassVar[bool] = False
    fidelity: ClassVar[str] = "reconstructed"

    def _choose(self, attention: Tensor, count: int) -> Tensor:
        if self.adaptive:
            attended = outliers(attention)
            samples = self._adaptive_samples(attention, attended)
            return torch.cat([super()._choose(attention, attended), samples])[:count]
        kept = super()._choose(attention, math.ceil(count / 4))
        rest = _others(attention, kept)
        wanted = count - len(kept)
        places = torch.arange(wanted, device=kept.device) * len(rest) // max(1, wanted)
        return torch.cat([kept, rest[places]])

    def _adaptive_samples(self, attention: Tensor, attended: int) -> Tensor:
        step = max(1, len(attention) // attended // 3)
        rest = _others(attention, super()._choose(attention, attended))
        # The last token is never sampled, as in the released code.
        return rest[(rest % step == 0) & (rest < len(attention) - 1)]


def _others(attention: Tensor, kept: Tensor) -> Tensor:
    free = torch.ones_like(attention, dtype=torch.bool)
    free[kept] = False
    return free.nonzero().flatten()
