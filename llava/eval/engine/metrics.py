"""From answers and timings to figures: `metrics.json`, and medians over batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from llava.eval.engine.batches import Plan
from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.schema import SCHEMA_VERSION, Record
from llava.eval.stats import paired_difference
from llava.eval.tasks.base import Benchmark, Item


def summarise(
    benchmark: Benchmark, plan: Plan, arms: Sequence[Arm], answers: Sequence[Record]
) -> Record:
    """Compute `metrics.json`, see `schema.Metrics`; the same after any interruption."""
    by_arm: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in answers:
        by_arm[record["arm"]][record["index"]] = record
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
    tokens = [line["tokens_in"] for line in lines if line["shown"]]
    return {
        "metrics": {key: asdict(metric) for key, metric in scored.items()},
        **_difference(lines, unpruned),
        "tokens_mean": fmean(tokens) if tokens else None,
        "tokens_min": min(tokens, default=None),
        "tokens_max": max(tokens, default=None),
        "answered": len(asked),
        "failed_images": count_failed(list(records.values())),
    }


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
    scores = [[float(line["score"]) for line in column] for column in zip(*pairs, strict=True)]
    estimate = paired_difference(*scores, images)
    se = None if math.isnan(estimate.se) else estimate.se
    return {"difference": {"value": estimate.mean, "se": se, "n": estimate.n}}


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


def result_rows(metrics: Record, timings: Sequence[Record]) -> list[Record]:
    """Make the rows of a result file, see `schema.ResultRow`.

    Args:
        metrics: of a run of `llava-tiny`, with the arm `none`.
        timings: lines of its `timings.jsonl`.
    """
    times, arms = BatchTimes(timings), metrics["arms"]
    return [_row(name, arm, arms[UNPRUNED]) | _times(times, name) for name, arm in arms.items()]


def _row(name: str, arm: Record, unpruned: Record) -> Record:
    pruning = arm["pruning"]
    whole = None if arm["image"] == "absent" else unpruned["tokens_max"]
    row = {
        "arm": name,
        "label": arm["label"],
        "method": UNPRUNED if pruning is None else pruning["method"],
        "budget": whole if pruning is None else pruning["keep_tokens"],
        "control": arm.get("control"),
        "unavailable": arm.get("unavailable"),
    }
    if not arm["answered"]:
        return row
    cells = {key: _accuracy(metric) for key, metric in arm["metrics"].items()}
    accuracy = cells.pop("accuracy")
    base = unpruned["metrics"]["accuracy"]["value"] / 100
    return row | {
        "tokens_min": arm["tokens_min"] or 0,
        "tokens_max": arm["tokens_max"] or 0,
        "accuracy": accuracy["accuracy"],
        "accuracy_se": accuracy["accuracy_se"],
        "relative": accuracy["accuracy"] / base if base else None,
        "difference": arm["difference"]["value"],
        "difference_se": arm["difference"]["se"],
        "n": accuracy["n"],
        "families": cells,
    }


def _accuracy(metric: Record) -> Record:
    se = None if metric["se"] is None else metric["se"] / 100
    return {"accuracy": metric["value"] / 100, "accuracy_se": se, "n": metric["n"]}


def _times(times: BatchTimes, name: str) -> Record:
    """Return the medians of an arm; ratios are to the unpruned prefill of the same batch."""

    def ratio(key: str) -> Callable[[Any, Any], float | None]:
        return lambda own, base: None if own[key] is None else own[key] / base["prefill_ms"]

    values: dict[str, Callable[[Any, Any], float | None]] = {
        "prune_ms": lambda own, _: own["prune_ms"],
        "prefill_ms": lambda own, _: own["prefill_ms"],
        "decode_ms": lambda own, _: own["decode_ms"],
        "prune_ratio": ratio("prune_ms"),
        "prefill_ratio": ratio("prefill_ms"),
    }
    return {key: times.median(name, value)[0] for key, value in values.items()}
