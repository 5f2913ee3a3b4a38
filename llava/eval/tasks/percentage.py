"""Accuracies with their standard error."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from llava.eval.stats import mean_estimate
from llava.eval.tasks.base import Metric


def percentage(scores: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Metric:
    """100 x the mean of `scores` [n], each in [0, 1].

    The standard error is clustered where `clusters` [n] names what several scores share (the
    image, or the question that is asked several times); with one score a cluster it is the usual
    one. It is None where fewer than two clusters exist.
    """
    found = mean_estimate(scores, clusters)
    return Metric(
        value=100 * found.mean,
        se=None if math.isnan(found.se) else 100 * found.se,
        n=found.n,
    )
