"""From answers and timings to figures: `metrics.json`, and medians over batches."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from llava.eval.engine.batches import Plan
from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.schema import SCHEMA_VERSION, Record
from llava.eval.stats import mean_estimate, paired_difference
from llava.eval.tasks.base import Benchmark, Item


def summarise(
    benchmark: Benchmark, plan: Plan, arms: Sequence[Arm], answers: Sequence[Record]
) -> Record:
    """Compute `metrics.json`, see `schema.Metrics`; the same after any interruption."""
    by_arm = _by_arm(answers)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": benchmark.name,
        "protocol": benchmark.protocol,
        "headline": benchmark.headline,
        "items": len(plan.items),
        "arms": {
            arm.name: arm.to_dict()
            | _figures(benchmark, plan.items, by_arm[arm.name], by_arm[UNPRUNED])
            for arm in arms
        },
    }


def _by_arm(answers: Sequence[Record]) -> dict[str, dict[int, Record]]:
    found: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in answers:
        found[record["arm"]][record["index"]] = record
    return found


def count_failed(answers: Sequence[Record]) -> int:
    """Count the items that could not be asked."""
    return len({line["index"] for line in answers if "error" in line})


def _figures(
    benchmark: Benchmark,
    items: Sequence[Item],
    records: Mapping[int, Record],
    unpruned: Mapping[int, Record],
) -> Record:
    asked = [item for item in items if "error" not in records.get(item.index, {"error": ""})]
    lines = [records[item.index] for item in asked]
    scored = benchmark.score(asked, [line["answer"] for line in lines]) if asked else {}
    shown = [line for line in lines if line["shown"]]
    tokens = [line["tokens_in"] for line in shown]
    means = [line["tokens_mean" if "tokens_mean" in line else "tokens_in"] for line in shown]
    return {
        "metrics": {key: asdict(metric) for key, metric in scored.items()},
        **_difference(lines, unpruned),
        "tokens_in": fmean(tokens) if tokens else None,
        "tokens_mean": fmean(means) if means else None,
        "tokens_min": min(tokens, default=None),
        "tokens_max": max(tokens, default=None),
        **between_layers(lines),
        "answered": len(asked),
        "failed_images": count_failed(list(records.values())),
    }


def between_layers(lines: Sequence[Record]) -> Record:
    """Average what layers read of the prompts with images, see `schema.LayerTokens`.

    Returns:
        The key `between_layers`; nothing if no answer says what layers read.
    """
    if not any("tokens_per_layer" in line for line in lines):
        return {}
    shown = [line for line in lines if line["shown"]]
    by_layer = zip(*(line["tokens_per_layer"] for line in shown), strict=True)
    names = ("tokens_in", "tokens_last", "tokens_mean")
    means = {name: fmean(line[name] for line in shown) if shown else None for name in names}
    return {"between_layers": means | {"tokens_per_layer": [fmean(layer) for layer in by_layer]}}


def _difference(lines: Sequence[Record], unpruned: Mapping[int, Record]) -> Record:
    """Pair the scores of an arm with those of the unpruned one; empty without scores."""
    pairs = [
        (line, unpruned[line["index"]])
        for line in lines
        if line["score"] is not None and unpruned.get(line["index"], {}).get("score") is not None
    ]
    if not pairs:
        return {}
    images = [tuple(line["images"]) or line["index"] for line, _ in pairs]
    own, base = ([float(line["score"]) for line in column] for column in zip(*pairs, strict=True))
    estimate = paired_difference(own, base, images)
    return {"difference": {"value": estimate.value, "se": estimate.se, "n": estimate.n}}


class BatchTimes:
    """Lines of `timings.jsonl` by arm and batch.

    The first batch of each process pays for caches and allocations; it is left out unless there is
    no other.
    """

    def __init__(self, timings: Sequence[Record]) -> None:
        self._lines: dict[str, dict[int, Record]] = defaultdict(dict)
        for line in [line for line in timings if not line["cold"]] or timings:
            self._lines[line["arm"]][line["batch"]] = line

    def median(
        self, arm: str, value: Callable[[Any, Any], float | None]
    ) -> tuple[float | None, int]:
        """Return a median over batches, and over how many.

        Args:
            arm: its name.
            value: takes the arm's line of a batch and the unpruned arm's, an empty one without it;
                None leaves the batch out.

        Returns:
            The median, None without any batch, and the number of batches.
        """
        base = self._lines.get(UNPRUNED, {})
        pairs = [(line, base.get(batch, {})) for batch, line in self._lines.get(arm, {}).items()]
        found = [number for pair in pairs if (number := value(*pair)) is not None]
        return (median(found) if found else None), len(found)


def result_rows(
    arms: Sequence[Arm], answers: Sequence[Record], timings: Sequence[Record]
) -> list[Record]:
    """Make the rows of a result file, see `schema.ResultRow`.

    Args:
        arms: of a run, the unpruned one among them.
        answers: its records; items have scores and categories.
        timings: lines of its `timings.jsonl`.
    """
    times, by_arm = BatchTimes(timings), _by_arm(answers)
    return [_row(arm, by_arm[arm.name], by_arm[UNPRUNED]) | _times(times, arm.name) for arm in arms]


def _row(arm: Arm, records: Mapping[int, Record], unpruned: Mapping[int, Record]) -> Record:
    lines = [line for line in records.values() if "error" not in line]
    base = [line for line in unpruned.values() if "error" not in line]
    whole = max((line["tokens_in"] for line in base), default=None)
    row = {
        "arm": arm.name,
        "label": arm.label,
        "method": arm.method,
        "budget": None if arm.image == "absent" else arm.budget or whole,
        "control": arm.control,
        "unavailable": arm.unavailable,
    }
    if arm.floor is not None:
        row["floor"] = arm.floor
    if not lines:
        return row
    families: dict[str, list[Record]] = defaultdict(list)
    for line in lines:
        families[line["category"]].append(line)
    accuracy, reference = _accuracy(lines), _accuracy(base)["accuracy"]
    difference = _difference(lines, unpruned)["difference"]
    return row | {
        "tokens_min": min(line["tokens_in"] for line in lines),
        "tokens_max": max(line["tokens_in"] for line in lines),
        **between_layers(lines),
        "accuracy": accuracy["accuracy"],
        "accuracy_se": accuracy["accuracy_se"],
        "relative": accuracy["accuracy"] / reference if reference else None,
        "difference": difference["value"],
        "difference_se": difference["se"],
        "n": len(lines),
        "families": {name: _accuracy(own) for name, own in sorted(families.items())},
    }


def _accuracy(lines: Sequence[Record]) -> Record:
    scores = [float(line["score"]) for line in lines]
    estimate = mean_estimate(scores, [tuple(line["images"]) for line in lines])
    return {"accuracy": estimate.value, "accuracy_se": estimate.se, "n": estimate.n}


def _times(times: BatchTimes, name: str) -> Record:
    """Return the medians of an arm; ratios are to the unpruned prefill of the same batch."""

    def time(key: str) -> float | None:
        return times.median(name, lambda own, _: own[key])[0]

    def ratio(key: str) -> float | None:
        return times.median(name, lambda own, base: own[key] and own[key] / base["prefill_ms"])[0]

    found = {key: time(key) for key in ("prune_ms", "prefill_ms", "decode_ms")}
    bytes_, batches = times.median(name, lambda own, _: own.get("kv_bytes"))
    if batches:
        found["kv_bytes"] = bytes_
    return found | {"prune_ratio": ratio("prune_ms"), "prefill_ratio": ratio("prefill_ms")}
