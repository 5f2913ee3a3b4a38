"""Figures that are made of raw times: scaling by layers, totals, ratios, bounds, break-even."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest

from llava.bench.summary import (
    bound_ms,
    break_even,
    figures_of,
    head_times,
    spread,
    step_times,
    totals_of,
)

TIMES = {
    "encode": [10.0, 12.0],
    "score": [1.0, 1.0],
    "select": [2.0, 2.0],
    "splice": [0.5, 0.5],
    "prefill": [6.0, 8.0],
    "head": [1.0, 2.0],
    "decode_head": [0.5, 1.0],
    "decode": [2.0, 3.0],
}


def arm(**changes: Any) -> Any:
    return {"times": copy.deepcopy(TIMES), "tokens": 64, "all_tokens": 576, **changes}


def test_language_model_times_are_scaled_and_the_output_layer_is_not() -> None:
    heads = {"prefill": 1.0, "decode": 0.5}
    times = step_times(arm(), 16, heads)
    assert times["prefill"] == [1 + 16 * 5, 1 + 16 * 7]
    assert times["decode"] == [0.5 + 16 * 1.5, 0.5 + 16 * 2.5]
    assert times["encode"] == TIMES["encode"]
    assert step_times(arm(), 1, {})["prefill"] == TIMES["prefill"]


def test_one_slow_call_of_the_output_layer_changes_no_time() -> None:
    """Scaled, an error of it would count many times; it does the same in all arms of a batch."""
    arms = [arm(source=source, batch=batch) for source in ("this", "other") for batch in (1, 2)]
    arms.append(arm(source="this", batch=1))
    arms[0]["times"]["head"] = [1.0, 1.5]
    arms[1]["times"]["head"] = [7.0, 7.0]
    arms[4]["times"]["head"] = [1.2, 90.0]
    heads = head_times(arms)
    assert heads["this", 1] == {"prefill": 1.35, "decode": 0.75}
    assert heads["this", 2]["prefill"] == 7 and heads["other", 1]["prefill"] == 1.5
    del arms[4]["times"]["decode_head"], arms[0]["times"]["decode_head"]
    assert head_times(arms)["this", 1] == {"prefill": 1.35}


def test_totals_count_every_step_once() -> None:
    times = step_times(arm(), 1, {})
    assert totals_of(times, 1) == [19.5, 23.5]
    assert totals_of(times, 4) == [19.5 + 3 * 2, 23.5 + 3 * 3]


def test_percentiles() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2, 1, 3)
    assert spread([float(n) for n in range(101)]) == (50, 5, 95)


def test_a_bound_is_the_longer_of_products_and_bytes() -> None:
    rates = {"float32": 100.0, "bfloat16": 200.0, "memory": 10.0}
    work: Any = {"flops": {"float32": 100, "bfloat16": 100}, "bytes": 1, "launches": None}
    assert bound_ms(work, rates) == 1500
    assert bound_ms({**work, "bytes": 20}, rates) == 2000
    assert bound_ms({**work, "flops": {"float16": 100}, "bytes": 0}, rates) == 1000


@pytest.mark.parametrize(("cost", "tokens"), [(0, 576), (51.2, 64), (25.6, 320), (100, -424)])
def test_break_even(cost: float, tokens: float) -> None:
    """512 removed tokens save 51.2 ms, so every ms must be earned by ten removed tokens."""
    free = [10.0, 10.0]
    found = break_even(arm(), [61.2, 61.2], free, [value + cost for value in free])
    assert found == pytest.approx(tokens)


def test_break_even_needs_a_saving() -> None:
    assert break_even(arm(), [5.0], [6.0], [7.0]) is None
    assert break_even(arm(tokens=576), [5.0], [6.0], [7.0]) is None


def test_ratios_are_taken_within_a_repeat(bench_result: Any) -> None:
    """One slow repeat, slow for all arms, changes no ratio."""
    arms = bench_result["arms"]
    for index, record in enumerate(arms):
        own = 1.0 if record["arm"] == "none" else 0.25 if record["free"] else 0.5
        for name in record["times"]:
            record["times"][name] = [own, 100 * own] if name == "prefill" else [0.0, 0.0]
        assert index < len(arms)
    for figures in figures_of(bench_result):
        if figures.arm["method"] == "zoo-exact":
            assert figures.prefill_speed_up == (2, 2, 2)
            assert figures.speed_up[1] == (2, 2, 2)
        elif figures.arm["free"]:
            assert figures.prefill_speed_up.median == 4
            assert figures.of_free_prefill == (1, 1, 1)


def test_noise_of_the_language_model_is_no_part_of_the_share_of_free(bench_result: Any) -> None:
    """Arms that feed it as many tokens share one time of it; only their stages differ."""
    for record in bench_result["arms"]:
        noise = 3.0 if record["free"] else 1.0
        for name in record["times"]:
            record["times"][name] = [10.0 * noise] * 2 if name == "prefill" else [0.0, 0.0]
        if record["method"] == "zoo-exact":
            record["times"]["score"] = [5.0, 10.0]
    conditions = bench_result["conditions"]
    conditions["layers"] = conditions["depth"]
    for figures in figures_of(bench_result):
        if figures.arm["method"] == "zoo-exact":
            same = [a for a in bench_result["arms"] if a["prompt"] == figures.arm["prompt"]]
            middle = statistics.median([30.0 if a["free"] else 10.0 for a in same])
            shares = [middle / (middle + 10), middle / (middle + 5)]
            assert figures.of_free_prefill is not None
            assert figures.of_free_prefill.low == pytest.approx(shares[0])
            assert figures.of_free_prefill.high == pytest.approx(shares[1])


def test_a_free_arm_of_another_size_is_not_compared_with(bench_result: Any) -> None:
    """Methods that choose how many tokens they keep have no share of it."""
    for record in bench_result["arms"]:
        if record["method"] == "zoo-exact":
            record["prompt"] -= 1
    for figures in figures_of(bench_result):
        assert (figures.of_free_prefill is None) == (figures.arm["method"] in ("zoo-exact", "none"))


def test_a_stage_at_its_bound_reaches_what_is_allowed(bench_result: Any) -> None:
    rates = bench_result["rates"]
    rates.update(float32=1e9, memory=1e18)
    for record in bench_result["arms"]:
        record["times"] = {name: [0.0] for name in record["times"]}
        record["times"]["prefill"] = [10.0]
        record["work"]["stage"] = {"flops": {"float32": 10_000_000}, "bytes": 0, "launches": 1}
        if not record["free"]:
            record["times"]["score"] = [10.0]  # the bound: 1e7 operations at 1e9 a second
    for figures in figures_of(
        {**bench_result, "conditions": {**bench_result["conditions"], "layers": 4}}
    ):
        if figures.arm["method"] == "norm":
            assert figures.allowed == pytest.approx(0.5)
            assert figures.of_free_prefill is not None
            assert figures.of_free_prefill.median == pytest.approx(figures.allowed)
