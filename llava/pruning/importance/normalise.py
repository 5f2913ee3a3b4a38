"""Normalisation of importance scores."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this relative spread a score only carries rounding noise.
FLAT = 1e-4


def min_max(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """(S - min) / (max - min + 1e-8) over the valid tokens of every row (ZOO-Prune eq. 5).

    Rows where max - min <= 1e-4 * mean are constant up to rounding (a linear projector has the
    same Jacobian everywhere): their weights are all 1, so that noise decides nothing.

    Args:
        scores: [..., N] floating point.
        valid: BoolTensor [..., N]; invalid tokens do not count and get weight 0.

    Returns [..., N] in [0, 1].
    """
    if scores.shape[-1] == 0:
        return scores
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    lowest = scores.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    highest = scores.masked_fill(~valid, -torch.inf).amax(dim=-1, keepdim=True)
    count = valid.sum(dim=-1, keepdim=True)
    wide = torch.promote_types(scores.dtype, torch.float32)  # the sum may be beyond float16
    mean = scores.masked_fill(~valid, 0).to(wide).sum(dim=-1, keepdim=True) / count
    spread = highest - lowest
    weights = (scores - lowest) / (spread + 1e-8)
    weights = torch.where(spread <= FLAT * mean.abs(), torch.ones_like(scores), weights)
    return weights.masked_fill(~valid, 0)
