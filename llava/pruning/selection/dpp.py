"""Greedy MAP of a determinantal point process: the set of tokens that spans the most volume."""

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.precision import outside_autocast, widen
from llava.pruning.selection.max_min import cosine, first_argmax
from llava.pruning.selection.rows import Picks, check_rows, selectable

# A token whose remaining volume is below this many roundings of its own is in the span of the
# picked ones: what is left of it is noise.
SPENT = 64


@outside_autocast()
def dpp(
    z: Tensor,
    k: int | Tensor,
    *,
    quality: Tensor | None = None,
    valid: Tensor | None = None,
    rank_guard: bool = True,
) -> Picks:
    """Select by greedy MAP inference on the kernel L = diag(q) S diag(q), S the cosines of z.

    Step t takes the untaken i with the highest gain d2_i = det(L_{P+i}) / det(L_P), by the
    incremental Cholesky factor C of L_P: e_i = (L_ji - sum_s C_sj C_si) / sqrt(d2_j),
    d2 <- d2 - e^2 (Chen et al. 2018, arXiv 1709.05135; used by CDPruner, arXiv 2506.10967). Time
    k^2 n after the kernel. Ties go to the lowest index. Once every token that is left lies in the
    span of the picked ones (k above the rank of the kernel), quality alone decides.

    Args:
        z: [B, N, D]; half precision is computed in float32, float64 stays float64.
        k: tokens per row, one count or LongTensor [B].
        quality: [B, N], q; None means 1 everywhere.
        valid: BoolTensor [B, N]; False is never picked.
        rank_guard: False continues as published beyond the rank of the kernel, through roots of
            negative numbers: NaN, and from then on the first valid token again and again.

    Returns:
        Indices LongTensor [B, max k] in pick order, padded with -1, and margins of the gain. A row
        gives the same alone and in any batch.

    Raises:
        PruningError: NaN or inf, k above the number of valid tokens, or wrong shapes.
    """
    counts = check_rows(z, k, valid, quality=quality)
    rows = []
    for row, count in enumerate(counts):
        tokens = selectable(z, valid, row)
        similarity = cosine(widen(z[row, tokens]))
        # Exactly 1, so that rounding does not choose among tokens of equal quality.
        itself = similarity.diagonal()
        itself.copy_(itself > 0)
        own = similarity.new_ones(len(tokens)) if quality is None else quality[row, tokens]
        if not own.isfinite().all():
            raise PruningError("quality contains NaN or inf")
        picked = greedy_map(similarity, own.to(similarity), count, rank_guard=rank_guard)
        rows.append(Picks(tokens[picked.indices], picked.margins))
    return Picks.stack(rows)


@outside_autocast()
def greedy_map(similarity: Tensor, quality: Tensor, k: int, *, rank_guard: bool = True) -> Picks:
    """Pick one row of `dpp`: positions [k] and margins [k] of similarity [n, n], quality [n].

    The steps are taken as published, with nothing but them in the loop. Where a pick had already
    been spent, everything from there on is made again under guard.
    """
    kernel = quality[:, None] * similarity * quality
    spent = SPENT * torch.finfo(kernel.dtype).eps * kernel.diagonal()
    history, factor = kernel.new_empty(k + 1, len(kernel)), kernel.new_empty(k, len(kernel))
    gains, factors = history.split(1), factor.split(1)
    gains[0].copy_(kernel.diagonal())
    picks: list[Tensor] = []
    for step in range(k):
        left, next_left, own = gains[step], gains[step + 1], factors[step]
        pick = left.argmax(dim=1)  # the lowest of several
        row = kernel.index_select(0, pick)
        if step:
            before = factor[:step]
            row -= before.index_select(1, pick).T @ before
        torch.div(row, left.index_select(1, pick).sqrt_(), out=own)
        torch.addcmul(left, own, own, value=-1, out=next_left)
        next_left.index_fill_(1, pick, -torch.inf)
        picks.append(pick)
    if not picks:
        return Picks(kernel.new_empty(0, dtype=torch.long), kernel.new_empty(0))
    indices = torch.cat(picks)
    best = history[:k].gather(1, indices[:, None])[:, 0]
    sound = (best > spent[indices]).tolist() if rank_guard else []
    start = sound.index(False) if False in sound else k
    left = history[start].clone()
    passed_over = history[:k].scatter_(1, indices[:, None], -torch.inf).amax(dim=1)
    picked = Picks(indices, best - passed_over)
    if start == k:
        return picked
    rest = _guarded(kernel, quality, spent, left, factor, indices[:start])
    return Picks(*(torch.cat([sure[:start], new]) for sure, new in zip(picked, rest, strict=True)))


def _guarded(
    kernel: Tensor,
    quality: Tensor,
    spent: Tensor,
    left: Tensor,
    factor: Tensor,
    picked: Tensor,
) -> Picks:
    """Return the picks after `picked`: what is spent gains nothing, then quality decides."""
    taken = torch.zeros_like(left, dtype=torch.bool).index_fill_(0, picked, True)
    picks, margins = [], []
    for step in range(len(picked), len(factor)):
        gain = torch.where(left > spent, left, 0).masked_fill(taken, -torch.inf)
        exhausted = gain.amax() <= 0
        score = torch.where(exhausted, quality.masked_fill(taken, -torch.inf), gain)
        pick = first_argmax(score)
        taken = taken.scatter(0, pick[None], True)
        margins.append(score[pick] - score.masked_fill(taken, -torch.inf).amax())
        picks.append(pick)
        root = left[pick].clamp_min(torch.finfo(left.dtype).tiny).sqrt()
        row = kernel[pick] - factor[:step, pick] @ factor[:step]
        factor[step] = torch.where(exhausted, 0, row / root)
        left = left - factor[step].square()
    return Picks(torch.stack(picks), torch.stack(margins))
