"""Means, errors and paired differences against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava.eval.stats import mean_estimate, paired_difference


def test_standard_error_of_four_answers() -> None:
    # mean 3/4; squared residuals 3 * (1/4)^2 + (3/4)^2 = 3/4; variance 1/4; sd / sqrt(4) = 1/4.
    estimate = mean_estimate([1, 1, 1, 0])
    assert estimate.value == 0.75
    assert estimate.se == pytest.approx(0.25)
    assert estimate.n == 4


def test_one_question_per_image_is_the_textbook_formula() -> None:
    values = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    textbook = values.std(ddof=1) / math.sqrt(len(values))
    assert mean_estimate(list(values), list(range(50))).se == pytest.approx(textbook)


def test_questions_of_one_image_count_as_one_draw() -> None:
    # Each answer doubled within its image: no information is added, so the error must not shrink.
    single = mean_estimate([1, 1, 1, 0])
    doubled = mean_estimate([1, 1, 1, 1, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c", "d", "d"])
    assert doubled.se == pytest.approx(single.se)
    assert mean_estimate([1, 1, 1, 1, 1, 1, 0, 0]).se < single.se


def test_paired_difference_by_hand() -> None:
    # differences -1, 0, 0, 0, +1, -1: mean -1/6, squares 3 - 6/36 = 17/6,
    # variance 17/30, error sqrt(17/180).
    after, before = [0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 1]
    estimate = paired_difference(after, before)
    assert estimate.value == pytest.approx(-1 / 6)
    assert estimate.se == pytest.approx(math.sqrt(17 / 180))


def test_no_difference_has_no_error() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]).se == 0


def test_a_single_cluster_has_no_error_estimate() -> None:
    assert mean_estimate([1, 0], ["a", "a"]).se is None


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])


def test_runs_of_different_length_cannot_be_paired() -> None:
    with pytest.raises(ValueError):
        paired_difference([1, 0], [1])
