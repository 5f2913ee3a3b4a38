"""Greedy maximum coverage: the tokens that together represent most of what there is."""

from collections.abc import Callable

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.finite import largest_of_last
from llava.pruning.late_checks import refuse_if
from llava.pruning.selection.max_min import first_argmax
from llava.pruning.selection.rows import Picks


def cover(
    similarity: Tensor,
    k: int,
    last: Tensor | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Picks:
    """Pick k columns so that every row has a high value in some picked column.

    Step t takes the untaken j with the highest gain sum_u max(0, C_uj - best_u), where best_u is
    the highest value of row u in what was taken so far, 0 at first. The objective is monotone and
    submodular, so the greedy picks reach 1 - 1/e of the best possible. Ties go to the lowest index.
    MMTok, arXiv 2508.18264.

    Args:
        similarity: C [u, n], not negative, of u things to be covered by n candidates.
        k: how many, at most n.
        last: BoolTensor [n], columns that are picked only once all others are; None for none.
        score: makes of the gains [n] what the highest is picked of; None for the gains themselves.

    Returns:
        Positions LongTensor [k] in pick order and the margins [k] of the score.

    Raises:
        PruningError: a similarity is NaN or inf, or k is above n.
    """
    largest = largest_of_last(similarity)
    refuse_if(similarity.device, lambda: ~largest.isfinite(), _no_similarities)
    count = similarity.shape[1]
    if not 0 <= k <= count:
        raise PruningError(f"cannot pick {k} of {count} tokens")
    best = similarity.new_zeros(similarity.shape[0], 1)
    taken = torch.zeros(count, dtype=torch.bool, device=similarity.device)
    others = None if last is None else count - last.sum()
    picks: list[Tensor] = []
    history = similarity.new_empty(k, count)
    added = torch.empty_like(similarity)  # fresh memory of this size costs more than the sums
    for step in range(k):
        torch.sub(similarity, best, out=added)
        closed = taken if last is None or others is None else taken | (last & (others > step))
        gain = added.clamp_min_(0).sum(dim=0)
        own = (gain if score is None else score(gain)).masked_fill_(closed, -torch.inf)
        history[step] = own
        pick = first_argmax(own[None])
        picks.append(pick)
        taken.scatter_(0, pick, True)
        column = similarity.gather(1, pick.expand(len(best), 1))  # quick in both memory layouts
        torch.maximum(best, column, out=best)
    if not picks:
        return Picks(taken.new_empty(0, dtype=torch.long), similarity.new_empty(0))
    steps = torch.stack(picks)
    chosen = history.gather(1, steps)[:, 0]
    passed_over = history.scatter_(1, steps, -torch.inf).amax(dim=1)
    return Picks(steps[:, 0], chosen - passed_over)


def _no_similarities() -> PruningError:
    return PruningError("similarities contain NaN or inf")
