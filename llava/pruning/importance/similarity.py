"""How little a token resembles the others, and tokens without what all of them share."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.precision import outside_autocast
from llava.pruning.selection.max_min import selectable


def centred(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """z_i - mean_j z_j over the valid tokens of every row (Cen-Prune, arXiv 2608.30263).

    Args:
        z: [B, N, C]; half precision is computed in float32.
        valid: BoolTensor [B, N]; invalid tokens do not count and become 0.

    Returns [B, N, C]. A row is the same alone and in a batch.
    """
    out = z.new_zeros(z.shape, dtype=torch.promote_types(z.dtype, torch.float32))
    for row, tokens in _rows(z, valid):
        own = z[row, tokens].to(out.dtype)
        out[row, tokens] = own - own.mean(dim=0)
    return out


def scaled(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """Every channel of z [B, N, C] divided by sqrt(var + 1e-6) over a row's valid tokens.

    Half precision is computed in float32; invalid tokens become 0. Where one channel carries nearly
    all variance, all cosines are those of that channel alone (Cen-Prune on Qwen2.5-VL).
    """
    out = z.new_zeros(z.shape, dtype=torch.promote_types(z.dtype, torch.float32))
    for row, tokens in _rows(z, valid):
        own = z[row, tokens].to(out.dtype)
        out[row, tokens] = own / (own.var(dim=0, correction=0) + 1e-6).sqrt()
    return out


def sigmoid_of_z_score(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """sigmoid((s - mean) / std) of scores [B, N] over a row's valid tokens; invalid ones get 0.

    1/2 everywhere in a row of equal scores.
    """
    out = torch.zeros_like(scores)
    for row, tokens in _rows(scores, valid):
        own = scores[row, tokens]
        spread = own.std(correction=0).clamp_min(1e-6)
        out[row, tokens] = ((own - own.mean()) / spread).sigmoid()
    return out


@outside_autocast()
def distinctiveness(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """g_i = -mean_{j != i} cos(z_i, z_j) over the valid tokens of every row, before any centring.

    Args:
        z: [B, N, C]; half precision is computed in float32.
        valid: BoolTensor [B, N]; invalid tokens do not count and get 0.

    Returns [B, N] in [-1, 1], 0 in a row of one token. The cosines are summed at once,
    u_i . sum_j u_j with unit vectors u, so this takes N * C.
    """
    out = z.new_zeros(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))
    for row, tokens in _rows(z, valid):
        own = z[row, tokens].to(out.dtype)
        unit = own / own.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        others = unit @ unit.sum(dim=0) - unit.square().sum(dim=-1)
        out[row, tokens] = -others / max(len(tokens) - 1, 1)
    return out


def _rows(z: Tensor, valid: Tensor | None) -> list[tuple[int, Tensor]]:
    return [(row, selectable(z, valid, row)) for row in range(z.shape[0])]
