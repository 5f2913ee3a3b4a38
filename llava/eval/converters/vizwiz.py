"""VizWiz: what its server takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.converters.answers import Row
from llava.eval.scorers.evalai import normalise
from llava.eval.tasks.base import TaskError


def submission(split: Sequence[Row], results: Mapping[Any, str]) -> list[Row]:
    """[{image, answer}] for every question of `split`; TaskError where one has no result."""
    missing = [row["question_id"] for row in split if row["question_id"] not in results]
    if missing:
        raise TaskError(
            f"no result for {len(missing)} of {len(split)} VizWiz questions, the first is "
            f"{missing[0]!r}; the server takes complete submissions only"
        )
    return [
        {"image": row["image"], "answer": normalise(results[row["question_id"]])} for row in split
    ]
