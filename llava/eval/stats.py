"""Means, standard errors, paired differences and their tests, of per-question scores.

Several questions may ask about one image, and their errors then move together. The standard errors
here are therefore clustered by image; with one question per image they are the textbook
sd / sqrt(n).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A figure: `value` and its standard error `se` (None: undefined), over n items.

    `scale` is the largest possible value: 100 for percentages, 2000 for MME perception.
    """

    value: float
    se: float | None
    n: int
    scale: float = 100.0


RESAMPLES = 10_000
_AT_ONCE = 2**22  # numbers drawn at a time


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Metric:
    """Return the mean of `values` [n], its error robust to dependence within `clusters`.

    With residuals e_i = x_i - mean and G clusters g:
        se = sqrt(G / (G - 1) * sum_g (sum_{i in g} e_i)^2) / n
    `clusters` [n] names the cluster (the image) of each value; None makes each value its own.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    names = range(n) if clusters is None else clusters
    se = clustered_se([value - mean for value in values], names)
    return Metric(mean, None if se is None else se / n, n, scale=1.0)


def clustered_se(influences: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Return the standard error of any figure by the delta method; None below two clusters.

    A figure moves by u_i (`influences` [n]) when answer i does, and the answers about one image
    (`clusters` [n]) may err together:
        se = sqrt(G / (G - 1) * sum_g (sum_{i in g} u_i)^2)
    over the G clusters. For a mean, u_i = (x_i - mean) / n gives `mean_estimate`.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for cluster, influence in zip(clusters, influences, strict=True):
        sums[cluster] += influence
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(total**2 for total in sums.values()))


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Metric:
    """Return the mean of `values - baseline` over the same questions, and its standard error.

    Pairing removes what both runs share (how hard each question is), so this error is usually much
    smaller than that of either accuracy.
    """
    pairs = zip(values, baseline, strict=True)
    return mean_estimate([value - base for value, base in pairs], clusters)


def metric_of(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, scale: float = 100.0
) -> Metric:
    """Return the mean of `scores` in [0, 1] as a metric out of `scale`, see `mean_estimate`."""
    estimate = mean_estimate(scores, clusters)
    se = None if estimate.se is None else scale * estimate.se
    return Metric(scale * estimate.value, se, estimate.n, scale)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p-value: under equality each disagreement is a fair coin flip.

    min(1, 2 * P[Binomial(only_a + only_b, 1/2) <= min(only_a, only_b)]).
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n) if n else 1.0


def paired_bootstrap(
    values: Sequence[float],
    baseline: Sequence[float],
    clusters: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (low, high, p) of the mean of `values - baseline` [n]: 95 % interval and p-value.

    Whole clusters are drawn with replacement. p is two-sided: twice the smaller share of resamples
    on one side of zero, counting the observed one, at most 1.
    """
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, base, cluster in zip(values, baseline, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - base
        counts[cluster] = counts.get(cluster, 0) + 1
    total, size = np.array(list(sums.values())), np.array(list(counts.values()))
    draw = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < resamples:
        rows = min(resamples - len(means), max(1, _AT_ONCE // len(total)))
        chosen = draw.integers(len(total), size=(rows, len(total)))
        means += (total[chosen].sum(1) / size[chosen].sum(1)).tolist()
    found = np.array(means)
    low, high = np.quantile(found, [0.025, 0.975])
    side = min((found <= 0).sum(), (found >= 0).sum())
    return float(low), float(high), min(1.0, 2 * (int(side) + 1) / (resamples + 1))
