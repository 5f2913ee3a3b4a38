"""From per-question records to the rows of a result: accuracy here, timings apart from it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.schema import Record
from llava.eval.stats import Estimate, mean_estimate, paired_difference

Row = dict[str, Any]


def accuracy_rows(arms: Sequence[Arm], answers: Sequence[Record]) -> list[Row]:
    """One row per arm, computed from `answers` alone, hence the same after any interruption."""
    by_arm: dict[str, list[Record]] = defaultdict(list)
    for record in answers:
        if "error" not in record:
            by_arm[record["arm"]].append(record)
    baseline = by_arm[UNPRUNED]
    return [_row(arm, by_arm[arm.name], baseline) for arm in arms]


def timing_columns(arms: Sequence[Arm], timings: Sequence[Record]) -> dict[str, Row]:
    """Medians over batches for each arm, and ratios to the unpruned arm of the same batch.

    The first batch of each process pays for caches and allocations; it is left out unless there is
    no other. `prune_ms` is per image, `prefill_ms` and `decode_ms` (per step) per question.
    """
    warm = [line for line in timings if not line["cold"]] or list(timings)
    batches: dict[int, dict[str, Record]] = defaultdict(dict)
    for line in warm:
        batches[line["batch"]][line["arm"]] = line
    columns: dict[str, Row] = {}
    for arm in arms:
        pairs = [
            (lines[arm.name], lines[UNPRUNED]) for lines in batches.values() if arm.name in lines
        ]
        columns[arm.name] = {
            "prune_ms": _median(pairs, lambda own, _: own["prune_ms"]),
            "prefill_ms": _median(pairs, lambda own, _: own["prefill_ms"]),
            "decode_ms": _median(pairs, lambda own, _: own["decode_ms"]),
            "prune_ratio": _median(pairs, lambda own, base: _over(own["prune_ms"], base)),
            "prefill_ratio": _median(pairs, lambda own, base: _over(own["prefill_ms"], base)),
        }
    return columns


def _row(arm: Arm, records: Sequence[Record], baseline: Sequence[Record]) -> Row:
    row: Row = {
        "arm": arm.name,
        "label": arm.label,
        "method": arm.method,
        "budget": arm.budget,
        "control": arm.control,
        "unavailable": arm.unavailable,
    }
    if not records:
        return row
    scores, base = _scores(records), _scores(baseline)
    images = [tuple(record["images"]) for record in records]
    accuracy = mean_estimate(scores, images)
    unpruned = mean_estimate(base).mean
    families: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        families[record["category"]].append(position)
    return row | {
        "tokens_min": min(record["tokens_in"] for record in records),
        "tokens_max": max(record["tokens_in"] for record in records),
        **_fields("accuracy", accuracy),
        "relative": accuracy.mean / unpruned if unpruned else None,
        **_fields("difference", paired_difference(scores, base, images)),
        "n": len(records),
        "families": {
            name: _fields(
                "accuracy",
                mean_estimate([scores[i] for i in chosen], [images[i] for i in chosen]),
            )
            | {"n": len(chosen)}
            for name, chosen in sorted(families.items())
        },
    }


def _scores(records: Sequence[Record]) -> list[float]:
    return [float(record["score"]) for record in records]


def _fields(name: str, estimate: Estimate) -> Row:
    """Mean and standard error under JSON names; an undefined error is null."""
    se = None if math.isnan(estimate.se) else estimate.se
    return {name: estimate.mean, f"{name}_se": se}


def _over(milliseconds: float | None, base: Mapping[str, Any]) -> float | None:
    return None if milliseconds is None else milliseconds / base["prefill_ms"]


def _median(
    pairs: Sequence[tuple[Record, Record]], value: Callable[[Record, Record], float | None]
) -> float | None:
    """Median of `value(arm line, unpruned line)` over batches; None where it does not exist."""
    found = [number for pair in pairs if (number := value(*pair)) is not None]
    return median(found) if found else None
