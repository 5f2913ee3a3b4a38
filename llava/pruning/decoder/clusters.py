"""Density peaks: groups tokens around those that are dense and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.precision import outside_autocast, widen


@outside_autocast()
def merge_clusters(tokens: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """Merge tokens to the means of `count` clusters (DPC-kNN), as SparseVLM recycles tokens.

        d(i, j) = ||x_i - x_j|| / sqrt(D)
        density_i = exp(-mean of d^2 to the `count` nearest tokens, i itself among them) + noise_i
        delta_i = distance to the nearest denser token; the largest distance of all if none is
        centres are the tokens with the highest density_i delta_i; the others go to the nearest

    Args:
        tokens: [m, D]; half precision is computed in float32.
        count: of clusters, at most m.
        noise: [m], added to the densities; None for none.

    Returns:
        [count, D], by descending density_i delta_i of the centres: sums divided by (size + 1e-6).
    """
    x = widen(tokens)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    nearest = distance.topk(count, dim=1, largest=False).values
    density = nearest.square().mean(dim=1).neg().exp()
    if noise is not None:
        density = density + noise.to(density)
    denser = density > density[:, None]
    delta = distance.where(denser, distance.max()).amin(dim=1)
    # As in the released program: of two clusters the densest pair ties, and goes in topk's order.
    centres = (density * delta).topk(count).indices
    cluster = distance[:, centres].argmin(dim=1)
    cluster[centres] = torch.arange(count, device=x.device)
    own = torch.nn.functional.one_hot(cluster, count).T.to(x)
    return own @ x / (own.sum(dim=1, keepdim=True) + 1e-6)
