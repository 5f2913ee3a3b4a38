"""LLaVA-PruMerge+."""

import math

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.method import option, register
from llava.pruning.methods.prumerge import PruMerge, unkept


@register
class PruMergePlus(PruMerge):
    """PruMerge, with evenly spaced tokens in addition to the attended ones.

    Paper: as `prumerge`, arXiv 2403.15388. `adaptive=true` is the published rule: with a share r of
    patches attended to, every floor(floor(1 / r) / 3)-th token that is not kept yet comes too, some
    three for one. The released code stops with an error where no patch is attended to, or more than
    a third of them are; here it is at least one, and then every token comes.

    A budget of k is split in one of two ways. `quarter` is ours, since it was never published how
    tables of 64 or 128 tokens were made: of k - 1 tokens a quarter, rounded up, is attended to, the
    ratio of the adaptive rule; the others lie evenly among the rest, starting with the first.
    `release` is the other branch of the released code: with a = (k - 1) / 2, the a highest, then
    every s-th token from s / 2 on, s = floor(n / a), whether kept already or not (it is then read
    twice, and the token of the rest goes without as many of the first others). That fits some
    budgets only, such as 65, 129, 145 and 193 of 576; others are an error that names the nearest.

    `adaptive=true` and `split="release"` equal recorded runs; `quarter` has nothing to equal.

    Options: as `prumerge`; split `quarter` | `release`.
    """

    name = "prumerge-plus"
    signal = "class attention, place, key similarity"
    equivariant = False

    split: str = option("quarter", choices=("quarter", "release"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive and self.split == "release":
            raise PruningError(
                "adaptive=true and split='release' are two rules of the released code; use one"
            )

    def _choose(self, attention: Tensor, count: int) -> Tensor:
        if self.adaptive:
            attended = super()._choose(attention, len(attention))
            step = max(1, len(attention) // len(attended) // 3)
            rest = unkept(attention, attended)
            # The last token is never sampled, as in the released code.
            samples = rest[(rest % step == 0) & (rest < len(attention) - 1)]
            return torch.cat([attended, samples])[:count]
        if self.split == "release":
            spaced = _sample_as_released(len(attention), count)
            highest = super()._choose(attention, len(spaced))
            return torch.cat([highest, spaced.to(highest.device)])
        kept = super()._choose(attention, math.ceil(count / 4))
        rest = unkept(attention, kept)
        wanted = count - len(kept)
        places = torch.arange(wanted, device=kept.device) * len(rest) // max(1, wanted)
        return torch.cat([kept, rest[places]])


def _sample_as_released(n: int, count: int) -> Tensor:
    """Return every s-th of n tokens, LongTensor; PruningError unless they are count / 2."""
    if not _splits(n, count):
        fitting = [k for k in range(1, 2 * n + 1) if _splits(n, k)]
        below, above = ([k for k in fitting if (k < count) == less] for less in (True, False))
        works = " and ".join(str(k + 1) for k in below[-1:] + above[:1])
        raise PruningError(
            f"prumerge-plus with split='release' cannot make {count + 1} tokens of {n}; the "
            f"nearest budgets a tile that work are {works}"
        )
    step = n // (count // 2)
    return torch.arange(step // 2, n, step)


def _splits(n: int, count: int) -> bool:
    half, odd = divmod(count, 2)
    if odd or not 0 < half <= n:
        return False
    step = n // half
    return len(range(step // 2, n, step)) == half
