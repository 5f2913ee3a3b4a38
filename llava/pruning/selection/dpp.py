"""Greedy MAP of a determinantal point process: the set of tokens that spans the most volume."""

from functools import partial

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.indices import constant
from llava.pruning.kernels import usable
from llava.pruning.late_checks import refuse_if
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
    if quality is not None:
        quality = quality.to(torch.promote_types(z.dtype, torch.float32))
        refuse_if(z.device, partial(_not_finite, quality, valid), _no_quality)
    on_cpu = z.device.type == "cpu"
    if rank_guard and z.dtype != torch.float64 and usable(z, z.shape[1]):
        return _pick_by_kernel(z, quality, valid, counts)
    rows = []
    for row, count in enumerate(counts):
        # Without the guard the number of picks depends on their values, so the host waits anyway.
        if valid is None or on_cpu or not rank_guard:
            tokens, taken = selectable(z, valid, row), None
            own = z[row, tokens]
        else:
            tokens, taken = torch.arange(z.shape[1], device=z.device), ~valid[row]
            own = z[row].masked_fill(taken[:, None], 0)
        similarity = _similarity(own)
        likes = similarity.new_ones(len(tokens)) if quality is None else quality[row, tokens]
        picked = greedy_map(similarity, likes, count, rank_guard=rank_guard, taken=taken)
        rows.append(Picks(tokens[picked.indices], picked.margins))
    return Picks.stack(rows)


def _pick_by_kernel(
    z: Tensor, quality: Tensor | None, valid: Tensor | None, counts: list[int]
) -> Picks:
    """Pick as `dpp` under guard, with the steps of all rows in one kernel, in float32."""
    from llava.pruning.kernels.dpp import determinant_picks

    if valid is not None:  # what padding holds may be NaN
        z = z.masked_fill(~valid[..., None], 0)
    similarity = torch.stack([_similarity(row.clone()) for row in z])
    spent = SPENT * torch.finfo(torch.float32).eps
    wanted = constant(tuple(counts), z.device)
    return determinant_picks(similarity, quality, valid, wanted, max(counts, default=0), spent)


def _similarity(z: Tensor) -> Tensor:
    """Return the cosines [n, n] of tokens z [n, D] in float32 at least."""
    similarity = cosine(widen(z))
    # Exactly 1, so that rounding does not choose among tokens of equal quality.
    itself = similarity.diagonal()
    itself.copy_(itself > 0)
    return similarity


def _not_finite(quality: Tensor, valid: Tensor | None) -> Tensor:
    bad = ~quality.isfinite()
    return bad if valid is None else bad & valid


def _no_quality() -> PruningError:
    return PruningError("quality contains NaN or inf")


@outside_autocast()
def greedy_map(
    similarity: Tensor,
    quality: Tensor,
    k: int,
    *,
    rank_guard: bool = True,
    taken: Tensor | None = None,
) -> Picks:
    """Pick one row of `dpp`: positions [k] and margins [k] of similarity [n, n], quality [n].

    On the CPU the steps are taken as published, with nothing but them in the loop. Where a pick had
    already been spent, everything from there on is made again under guard. On an accelerator, where
    looking for that would wait, and with `taken`, BoolTensor [n] of what is out of reach, every
    guarded step is.
    """
    kernel = quality[:, None] * similarity * quality
    spent = SPENT * torch.finfo(kernel.dtype).eps * kernel.diagonal()
    factor = kernel.new_empty(k, len(kernel))
    if k == 0:
        return Picks(kernel.new_empty(0, dtype=torch.long), kernel.new_empty(0))
    if rank_guard and (taken is not None or kernel.device.type != "cpu"):
        if taken is None:
            taken = torch.zeros_like(quality, dtype=torch.bool)
        return _guarded(kernel, quality, spent, kernel.diagonal(), factor, taken, 0)
    history = kernel.new_empty(k + 1, len(kernel))
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
    indices = torch.cat(picks)
    best = history[:k].gather(1, indices[:, None])[:, 0]
    sound = (best > spent[indices]).tolist() if rank_guard else []
    start = sound.index(False) if False in sound else k
    left = history[start].clone()
    passed_over = history[:k].scatter_(1, indices[:, None], -torch.inf).amax(dim=1)
    picked = Picks(indices, best - passed_over)
    if start == k:
        return picked
    taken = torch.zeros_like(left, dtype=torch.bool).index_fill_(0, indices[:start], True)
    rest = _guarded(kernel, quality, spent, left, factor, taken, start)
    return Picks(*(torch.cat([sure[:start], new]) for sure, new in zip(picked, rest, strict=True)))


def _guarded(
    kernel: Tensor,
    quality: Tensor,
    spent: Tensor,
    left: Tensor,
    factor: Tensor,
    taken: Tensor,
    start: int,
) -> Picks:
    """Return the picks from step `start` on: what is spent gains nothing, then quality decides.

    Without reading a value: picks are LongTensors [1].
    """
    picks, margins = [], []
    for step in range(start, len(factor)):
        gain = torch.where(left > spent, left, 0).masked_fill(taken, -torch.inf)
        exhausted = gain.amax() <= 0
        score = torch.where(exhausted, quality.masked_fill(taken, -torch.inf), gain)
        pick = first_argmax(score[None])
        taken = taken.scatter(0, pick, True)
        margins.append(score.gather(0, pick) - score.masked_fill(taken, -torch.inf).amax())
        picks.append(pick)
        root = left.gather(0, pick).clamp_min(torch.finfo(left.dtype).tiny).sqrt()
        row = kernel.index_select(0, pick)[0]
        if step:
            row -= factor[:step].index_select(1, pick)[:, 0] @ factor[:step]
        factor[step] = torch.where(exhausted, 0, row / root)
        left = left - factor[step].square()
    return Picks(torch.cat(picks), torch.cat(margins))
