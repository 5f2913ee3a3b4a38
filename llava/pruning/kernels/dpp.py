"""Greedy MAP of determinants, the whole loop in one program a row: `selection.dpp` in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.pruning.kernels.reductions import top_two, warps
from llava.pruning.selection.rows import Picks


def determinant_picks(
    similarity: Tensor,
    quality: Tensor | None,
    valid: Tensor | None,
    counts: Tensor,
    width: int,
    spent: float,
) -> Picks:
    """Pick greedily in every row by the gain in det of L = diag(q) S diag(q), under rank guard.

    A token whose remaining volume is at most `spent` times its own gains nothing; where all that
    are left gain nothing, quality decides. Ties go to the lowest index. NaN gains nothing, so that
    every index is of a token; such a result means nothing. Time k^2 N a row in one program: for
    hundreds of picks out of thousands of tokens most of it is spent on the factor.

    Args:
        similarity: S [B, N, N] float32, symmetric, read by rows.
        quality: q [B, N] float32; None means 1.
        valid: BoolTensor [B, N]; False is never picked. None if everything is valid.
        counts: LongTensor [B] on the same device, picks of every row.
        width: at least the highest count.
        spent: share of its own volume L_ii below which a token counts as spanned by the picked.

    Returns:
        Indices LongTensor [B, width] in pick order, -1 from a row's count on and where it has no
        more valid tokens; margins of the gain float32 [B, width], there `inf`.
    """
    batch, size = similarity.shape[:2]
    indices = torch.full((batch, width), -1, dtype=torch.long, device=similarity.device)
    margins = torch.full((batch, width), torch.inf, device=similarity.device)
    if batch * width == 0:
        return Picks(indices, margins)
    block = triton.next_power_of_2(size)
    _pick_rows[(batch,)](
        similarity.contiguous(),
        None if quality is None else quality.contiguous(),
        None if valid is None else valid.contiguous(),
        counts,
        similarity.new_empty(batch, width, size),
        indices,
        margins,
        size,
        width,
        spent,
        BLOCK=block,
        CHUNK=chunk(block),
        num_warps=warps(block),
        num_stages=1,
        enable_fp_fusion=False,
    )
    return Picks(indices, margins)


def chunk(block: int) -> int:
    """Return how many earlier picks of the factor are read at once: what the registers hold."""
    return 8 if block <= 4096 else 2


@triton.jit(do_not_specialize=["width"])
def _pick_rows(
    similarity,
    quality,
    valid,
    counts,
    factor,
    indices,
    margins,
    size,
    width,
    spent,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    inside = tokens < size
    similarity += row * size * size
    factor += row * width * size
    indices += row * width
    margins += row * width
    free = inside
    if valid is not None:
        free = tl.load(valid + row * size + tokens, mask=inside, other=0) != 0
    count = tl.minimum(tl.load(counts + row), tl.sum(free.to(tl.int64), axis=0))
    count = tl.minimum(count, width).to(tl.int32)
    own = tl.full((BLOCK,), 1.0, tl.float32)
    if quality is not None:
        quality += row * size
        own = tl.load(quality + tokens, mask=inside, other=0.0)
    left = own * tl.load(similarity + tokens.to(tl.int64) * (size + 1), mask=inside, other=0.0)
    left = left * own
    least = spent * left
    preferred = tl.where(own == own, own, -3.4028234663852886e38)
    for step in range(0, count):
        gain = tl.where(left > least, left, 0.0)
        best, pick, second = top_two(tl.where(free, gain, float("-inf")), tokens)
        exhausted = best <= 0.0
        if exhausted:
            best, pick, second = top_two(tl.where(free, preferred, float("-inf")), tokens)
        tl.store(indices + step, pick.to(tl.int64))
        tl.store(margins + step, best - second)
        free = free & (tokens != pick)
        if not exhausted:  # beyond the rank nothing changes any more
            line = tl.load(similarity + pick.to(tl.int64) * size + tokens, mask=inside, other=0.0)
            if quality is not None:
                line = (tl.load(quality + pick) * line) * own
            for start in range(0, step, CHUNK):
                slots = start + tl.arange(0, CHUNK)
                before = slots < step
                places = slots * size
                of_pick = tl.load(factor + places + pick, mask=before, other=0.0)
                of_all = tl.load(
                    factor + places[:, None] + tokens[None, :],
                    mask=before[:, None] & inside[None, :],
                    other=0.0,
                )
                line -= tl.sum(of_pick[:, None] * of_all, axis=0)
            line = tl.div_rn(line, tl.sqrt_rn(best))
            tl.store(factor + step * size + tokens, line, mask=inside)
            left -= line * line
            # The next step reads what other threads have just stored.
            tl.debug_barrier()
