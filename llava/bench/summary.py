"""Figures of a bench from its raw times: totals, ratios within a repeat, bounds, break-even."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.bench.arms import FREE
from llava.bench.counts import Work
from llava.bench.schema import ArmResult, BenchResult
from llava.eval.engine.request import UNPRUNED

# Steps of an answer in their order.
ROWS = ("encode", "score", "select", "splice", "between", "prefill", "decode")


# Times of the output layer alone, by the step that it is a part of.
HEADS = {"prefill": "head", "decode": "decode_head"}


class Spread(NamedTuple):
    """Median, 5th and 95th percentile over repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise values; percentiles are those of the nearest rank."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(0.05 * last)], ordered[round(0.95 * last)]
    return Spread(statistics.median(ordered), low, high)


@dataclass(frozen=True)
class Figures:
    """What is made of the raw times of one arm.

    Attributes:
        arm: as in the file.
        rows: ms by step; those of the language model scaled to all its layers.
        totals: ms by length of the answer: encode + stage + splice + prefill + decoding steps.
        speed_up: total of the unpruned arm over this one's, by length of the answer.
        prefill_speed_up: the same from features to the first token: stage + splice + prefill.
        of_free: total of the free arm with the same budget over this one's; 1 costs nothing. The
            language model's time is that of `same_model_time` in both. Empty where the method keeps
            another number of tokens than that arm.
        of_free_prefill: the same from features to the first token, where encoding hides nothing.
        allowed: `of_free_prefill` if the stage took only as long as its operations and bytes allow.
        bounds: ms by step that operations and bytes allow.
        pays_up_to: the most tokens that this method may keep of an image and still give the first
            token no later than the unpruned model, see `break_even`.
        one_time_ms: what the first call of the stage took beyond a later one.
    """

    arm: ArmResult
    rows: dict[str, Spread]
    totals: dict[int, Spread]
    speed_up: dict[int, Spread]
    prefill_speed_up: Spread
    of_free: dict[int, Spread]
    of_free_prefill: Spread | None
    allowed: float | None
    bounds: dict[str, float]
    pays_up_to: float | None
    one_time_ms: float


def figures_of(result: BenchResult) -> list[Figures]:
    """Return the figures of all arms, in the order of the file."""
    scale = result["conditions"]["depth"] / result["conditions"]["layers"]
    heads = head_times(result["arms"])
    series = {
        _key(arm): step_times(arm, scale, heads[arm["source"], arm["batch"]])
        for arm in result["arms"]
    }
    shared = same_model_time(result["arms"], series)
    return [_figures(result, arm, series, shared) for arm in result["arms"]]


def _key(arm: ArmResult) -> tuple[str, int, str]:
    return arm["source"], arm["batch"], arm["arm"]


def head_times(arms: Sequence[ArmResult]) -> dict[tuple[str, int], dict[str, float]]:
    """Return the median ms of the output layer in prefill and decode, by source and batch size.

    It does the same in all arms, and scaling multiplies an error of it by almost the scale.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for arm in arms:
        own = found.setdefault((arm["source"], arm["batch"]), {})
        for step, head in HEADS.items():
            own.setdefault(step, []).extend(arm["times"].get(head, ()))
    return {
        key: {step: statistics.median(values) for step, values in own.items() if values}
        for key, own in found.items()
    }


def step_times(arm: ArmResult, scale: float, heads: Mapping[str, float]) -> dict[str, list[float]]:
    """Return ms by step, one entry a repeat, with all layers of the language model.

    Args:
        arm: as in the file.
        scale: decoder layers of the model over those that were run. All that is not the output
            layer is scaled: the layers, and with them mask, rotary angles and last norm.
        heads: ms of the output layer in `prefill` and `decode`, see `head_times`.
    """
    times = {name: list(arm["times"][name]) for name in ROWS if name in arm["times"]}
    if scale == 1:
        return times
    for name in HEADS.keys() & times.keys():
        head = heads[name]
        times[name] = [head + scale * max(0.0, whole - head) for whole in times[name]]
    return times


def same_model_time(
    arms: Sequence[ArmResult], series: Mapping[Any, dict[str, list[float]]]
) -> dict[Any, dict[str, list[float]]]:
    """Return `series` with one time of the language model for all arms that feed it as many tokens.

    It does the same for them, so that what differs between their prefills is the machine's doing;
    that is often more than a whole stage takes. The time is the median over these arms and repeats.
    """
    alike: dict[Any, list[dict[str, list[float]]]] = {}
    for arm in arms:
        alike.setdefault(_prompt_of(arm), []).append(series[_key(arm)])
    pooled = {}
    for arm in arms:
        own = dict(series[_key(arm)])
        for step in own.keys() & {"prefill", "decode"}:
            every = [ms for times in alike[_prompt_of(arm)] for ms in times.get(step, ())]
            own[step] = [statistics.median(every)] * len(own[step])
        pooled[_key(arm)] = own
    return pooled


def _prompt_of(arm: ArmResult) -> tuple[str, int, int, str]:
    """Say what the language model is fed; arms that drop tokens between layers have no equals."""
    between = arm["arm"] if "layer_tokens" in arm else ""
    return arm["source"], arm["batch"], arm["prompt"], between


def totals_of(times: Mapping[str, Sequence[float]], answer: int) -> list[float]:
    """Return ms from pixels to the end of an answer of so many tokens, one entry a repeat."""
    steps = [times[name] for name in ROWS if name != "decode" and name in times]
    before = [sum(parts) for parts in zip(*steps, strict=True)]
    if answer == 1:
        return before
    return [
        start + (answer - 1) * step for start, step in zip(before, times["decode"], strict=True)
    ]


def after_encode(times: Mapping[str, Sequence[float]]) -> list[float]:
    """Return ms from the features to the first token, one entry a repeat."""
    steps = ("score", "select", "splice", "between", "prefill")
    own = (times[step] for step in steps if step in times)
    return [sum(parts) for parts in zip(*own, strict=True)]


def _figures(
    result: BenchResult,
    arm: ArmResult,
    series: Mapping[Any, dict[str, list[float]]],
    shared: Mapping[Any, dict[str, list[float]]],
) -> Figures:
    source, batch, name = _key(arm)
    own, unpruned = series[_key(arm)], series[source, batch, UNPRUNED]
    prompts = {_key(other): other["prompt"] for other in result["arms"]}
    beside = (source, batch, f"{FREE}@{name.rpartition('@')[2]}")
    alike = prompts.get(beside) == arm["prompt"] and "layer_tokens" not in arm
    free = shared.get(beside) if alike else None
    beside_free = shared[_key(arm)]
    answers = result["conditions"]["answers"]
    bounds = {step: bound_ms(work, result["rates"]) for step, work in arm["work"].items()}
    totals = {answer: totals_of(own, answer) for answer in answers}
    base = {answer: totals_of(unpruned, answer) for answer in answers}
    given = {} if free is None else {answer: totals_of(free, answer) for answer in answers}
    stage = statistics.median(map(sum, zip(own["score"], own["select"], strict=True)))
    shared_totals = {answer: totals_of(beside_free, answer) for answer in answers}
    shortest = min(answers)
    return Figures(
        arm=arm,
        rows={step: spread(values) for step, values in own.items()},
        totals={answer: spread(values) for answer, values in totals.items()},
        speed_up={answer: ratio(base[answer], totals[answer]) for answer in answers},
        prefill_speed_up=ratio(after_encode(unpruned), after_encode(own)),
        of_free={answer: ratio(values, shared_totals[answer]) for answer, values in given.items()},
        of_free_prefill=None
        if free is None
        else ratio(after_encode(free), after_encode(beside_free)),
        allowed=None if free is None else allowed_share(free, bounds["stage"]),
        bounds=bounds,
        pays_up_to=break_even(arm, base[shortest], given.get(shortest), shared_totals[shortest]),
        one_time_ms=max(0.0, arm["first_ms"] - stage),
    )


def ratio(upper: Sequence[float], lower: Sequence[float]) -> Spread:
    """Summarise ratios of two arms, taken within a repeat."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


def bound_ms(work: Work, rates: Mapping[str, float]) -> float:
    """Return the ms that a step takes at least on this machine.

    Its products at the measured rate of their type, or its bytes at that of memory, whichever takes
    longer. A type that was not measured counts as float32.
    """
    products = sum(n / rates.get(kind, rates["float32"]) for kind, n in work["flops"].items())
    return 1000 * max(products, work["bytes"] / rates["memory"])


def allowed_share(free: Mapping[str, Sequence[float]], bound: float) -> float:
    """Return the share of the free arm's prefill that a stage at its bound (ms) would reach."""
    total, gather = statistics.median(after_encode(free)), statistics.median(free["select"])
    return total / (total - gather + max(gather, bound))


def break_even(
    arm: ArmResult,
    unpruned: Sequence[float],
    free: Sequence[float] | None,
    own: Sequence[float],
) -> float | None:
    """Return the most tokens that an arm may keep and still pay off at the shortest answer.

    The free arm shows what one removed token saves, (unpruned - free) / removed, taken as the same
    for every token, and what the arm costs beyond it, own - free. So many tokens must go before the
    cost is earned; the others may stay. Below 0: it never pays off.

    Args:
        arm: its tokens before and after.
        unpruned, free, own: totals in ms, one entry a repeat.
    """
    removed = arm["all_tokens"] - arm["tokens"]
    if free is None or removed == 0:
        return None
    saved = statistics.median(a - b for a, b in zip(unpruned, free, strict=True)) / removed
    cost = statistics.median(a - b for a, b in zip(own, free, strict=True))
    return arm["all_tokens"] - max(0.0, cost) / saved if saved > 0 else None
