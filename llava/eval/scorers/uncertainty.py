"""Standard errors of figures that are no plain means: ratios, and sums of them.

They follow from the delta method. A figure moves by u_i when answer i does (its influence), and
    se = sqrt(G / (G - 1) * sum_g (sum_{i in g} u_i)^2)
over the G clusters (images), whose answers may err together. For a mean, u_i = (x_i - mean) / n
gives `llava.eval.stats.mean_estimate` again. There is no random number in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def clustered_se(influences: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of a figure from its `influences` [n]; None for fewer than two clusters."""
    sums: dict[Hashable, float] = defaultdict(float)
    for cluster, influence in zip(clusters, influences, strict=True):
        sums[cluster] += influence
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(total**2 for total in sums.values()))


def ratio_influences(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Influence [n] of each answer on sum(`numerators`) / sum(`denominators`)."""
    total = math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    return [(a - ratio * b) / total for a, b in zip(numerators, denominators, strict=True)]
