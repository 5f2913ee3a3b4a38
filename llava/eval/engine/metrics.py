"""`metrics.json` of a run: every arm's figures, from its answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from llava.eval.engine.batches import Plan
from llava.eval.engine.request import Arm
from llava.eval.engine.run_folder import SCHEMA_VERSION, Record
from llava.eval.records import failed_items
from llava.eval.tasks.base import Benchmark, Metric


def by_arm(answers: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """{arm: {index of the item: its record}}."""
    found: dict[str, dict[int, Record]] = {}
    for record in answers:
        found.setdefault(record["arm"], {})[record["index"]] = record
    return found


def summarise(
    benchmark: Benchmark, plan: Plan, arms: Sequence[Arm], answers: Sequence[Record]
) -> Record:
    """The content of `metrics.json`; the same after any interruption."""
    records = by_arm(answers)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": benchmark.name,
        "protocol": benchmark.protocol,
        "headline": benchmark.headline,
        "items": len(plan.items),
        "arms": {
            arm.name: settings(arm) | _figures(benchmark, plan, records.get(arm.name, {}))
            for arm in arms
        },
    }


def settings(arm: Arm) -> dict[str, Any]:
    """An arm as result files describe it.

    An integer budget is a number of tokens, a float a share of an image's tokens: 1 and 1.0 differ.
    """
    described: dict[str, Any] = {
        "method": arm.method,
        "budget": arm.budget if arm.ratio is None else float(arm.ratio),
        "options": dict(arm.options),
    }
    return described | ({"unavailable": arm.unavailable} if arm.unavailable else {})


def _figures(benchmark: Benchmark, plan: Plan, records: Mapping[int, Record]) -> dict[str, Any]:
    asked = [
        (item, records[item.index])
        for item in plan.items
        if item.index in records and "error" not in records[item.index]
    ]
    metrics: Mapping[str, Metric] = {}
    if asked:
        items, lines = zip(*asked, strict=True)
        metrics = benchmark.score(items, [line["answer"] for line in lines])
    tokens = [line["tokens_in"] for _, line in asked if line["shown"]]
    return {
        "metrics": {key: asdict(metric) for key, metric in metrics.items()},
        "tokens_mean": fmean(tokens) if tokens else None,
        "tokens_min": min(tokens, default=None),
        "tokens_max": max(tokens, default=None),
        "answered": len(asked),
        "failed_images": failed_items(list(records.values())),
    }
