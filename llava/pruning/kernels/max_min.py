"""Greedy max-min selection, the whole loop in one program a row: `selection.max_min` in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.pruning.kernels.reductions import top_two, warps
from llava.pruning.selection.rows import Picks


def max_min_picks(
    gram: Tensor,
    scale: Tensor | None,
    weights: Tensor | None,
    score: Tensor,
    valid: Tensor | None,
    counts: Tensor,
    width: int,
    combine: str = "multiply",
) -> Picks:
    """Pick greedily in every row: first the highest `score`, then the highest w_i * d(i, picked).

    d = clamp(1 - cos, 0, 2) to the nearest picked token, cos_ij = gram_ij * (scale_i * scale_j).
    Ties go to the lowest index, nothing is picked twice. NaN in `gram` counts as no limit and NaN
    in `score` as lowest, so that every index is of a token; such a result means nothing.

    Args:
        gram: [B, N, N] float32 products of every two tokens, symmetric, read by rows.
        scale: [B, N] float32, one over every token's norm; None where `gram` holds cosines.
        weights: [B, N] float32, at least 0 to multiply; None means 1 to multiply and 0 to add.
        score: [B, N] float32, of the first pick.
        valid: BoolTensor [B, N]; False is never picked. None if everything is valid.
        counts: LongTensor [B] on the same device, picks of every row.
        width: at least the highest count.
        combine: "multiply", or "sum" for w_i + d(i, picked).

    Returns:
        Indices LongTensor [B, width] in pick order, -1 from a row's count on and where it has no
        more valid tokens; margins float32 [B, width], there `inf`.
    """
    batch, size = score.shape
    indices = torch.empty(batch, width, dtype=torch.long, device=gram.device)
    margins = torch.empty(batch, width, dtype=torch.float32, device=gram.device)
    if batch * width == 0:
        return Picks(indices, margins)
    block = triton.next_power_of_2(size)
    _pick_rows[(batch,)](
        gram.contiguous(),
        None if scale is None else scale.contiguous(),
        None if weights is None else weights.contiguous(),
        score.contiguous(),
        None if valid is None else valid.contiguous(),
        counts,
        indices,
        margins,
        size,
        width,
        ADDS=combine == "sum",
        BLOCK=block,
        num_warps=warps(block),
        num_stages=1,
        # Contracted to a multiply-add, 1 - cos would differ from the reference in the last bit.
        enable_fp_fusion=False,
    )
    return Picks(indices, margins)


@triton.jit(do_not_specialize=["width"])
def _pick_rows(
    gram,
    scale,
    weights,
    score,
    valid,
    counts,
    indices,
    margins,
    size,
    width,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    inside = tokens < size
    gram += row * size * size
    indices += row * width
    margins += row * width
    free = inside
    if valid is not None:
        free = tl.load(valid + row * size + tokens, mask=inside, other=0) != 0
    if scale is not None:
        scale += row * size
        own_scale = tl.load(scale + tokens, mask=inside, other=0.0)
    if weights is not None:
        weight = tl.load(weights + row * size + tokens, mask=inside, other=0.0)
    count = tl.minimum(tl.load(counts + row), tl.sum(free.to(tl.int64), axis=0))
    count = tl.minimum(count, width).to(tl.int32)
    for start in range(count // BLOCK * BLOCK, width, BLOCK):  # the padding
        slots = start + tokens
        padded = (slots >= count) & (slots < width)
        tl.store(indices + slots, tl.full((BLOCK,), -1, tl.int64), mask=padded)
        tl.store(margins + slots, tl.full((BLOCK,), float("inf"), tl.float32), mask=padded)
    now = tl.load(score + row * size + tokens, mask=inside, other=float("-inf"))
    now = tl.where(now == now, now, -3.4028234663852886e38)
    now = tl.where(free, now, float("-inf"))
    left = tl.where(free, float("inf"), float("-inf"))
    for step in range(0, count):
        best, pick, second = top_two(now, tokens)
        tl.store(indices + step, pick.to(tl.int64))
        tl.store(margins + step, best - second)
        cosine = tl.load(gram + pick.to(tl.int64) * size + tokens, mask=inside, other=0.0)
        if scale is not None:
            cosine = cosine * (tl.load(scale + pick) * own_scale)
        distance = 1.0 - cosine
        # Written so that NaN passes both limits on; tl.clamp leaves open what it makes of it.
        distance = tl.where(distance < 0.0, 0.0, distance)
        limit = tl.where(distance > 2.0, 2.0, distance)
        if weights is not None:
            limit = limit + weight if ADDS else limit * weight
        left = tl.where(limit < left, limit, left)  # NaN is no limit
        left = tl.where(tokens == pick, float("-inf"), left)
        now = left
