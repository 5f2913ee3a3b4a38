"""The bank of random directions shared by all tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def direction_bank(seed: int, width: int, count: int) -> Tensor:
    """[count, width] float32 on the CPU: unit-norm Gaussian rows (ZOO-Prune eq. 2). Read only.

    A pure function of its arguments: drawn from a private generator, always on the CPU and in
    float32, so that neither call order nor device nor dtype changes the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        bank = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
        return bank / bank.norm(dim=1, keepdim=True).clamp_min(1e-12)
