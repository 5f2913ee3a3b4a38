"""Min-max normalised scores in one program a row: `importance.normalise.min_max` in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.pruning.kernels.reductions import warps


def min_max(scores: Tensor, valid: Tensor | None, flat: float) -> Tensor:
    """Return (S - min) / (max - min + 1e-8) over the valid tokens of every row.

    Args:
        scores: [R, N] float32.
        valid: BoolTensor [R, N]; invalid tokens do not count and get 0. None if all are valid.
        flat: rows with max - min <= flat * |mean| get 1 everywhere.

    Returns:
        [R, N] float32.
    """
    rows, size = scores.shape
    weights = torch.empty(rows, size, dtype=torch.float32, device=scores.device)
    if rows * size == 0:
        return weights
    block = triton.next_power_of_2(size)
    _min_max[(rows,)](
        scores.contiguous(),
        None if valid is None else valid.contiguous(),
        weights,
        size,
        flat,
        BLOCK=block,
        num_warps=warps(block),
        enable_fp_fusion=False,
    )
    return weights


@triton.jit
def _min_max(scores, valid, weights, size, flat, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    inside = tokens < size
    real = inside
    if valid is not None:
        real = tl.load(valid + row * size + tokens, mask=inside, other=0) != 0
    score = tl.load(scores + row * size + tokens, mask=inside, other=0.0)
    # tl.min and tl.max pass NaN over, which a sum does not.
    total = tl.sum(tl.where(real, score, 0.0), axis=0)
    lowest = tl.min(tl.where(real, score, float("inf")), axis=0)
    spread = tl.max(tl.where(real, score, float("-inf")), axis=0) - lowest
    mean = total / tl.sum(real.to(tl.float32), axis=0)
    weight = tl.div_rn(score - lowest, tl.full((BLOCK,), 1e-8, tl.float32) + spread)
    weight = tl.where(spread <= flat * tl.abs(mean), 1.0, weight)
    weight = tl.where(total == total, weight, total)
    tl.store(weights + row * size + tokens, tl.where(real, weight, 0.0), mask=inside)
