"""GQA: the predictions that its evaluation script takes."""

from __future__ import annotations

from collections.abc import Iterable

from llava.eval.converters.answers import Row
from llava.eval.scorers.gqa import clean


def predictions(rows: Iterable[Row]) -> list[Row]:
    """[{questionId, prediction}] for GQA's scorer."""
    return [{"questionId": row["question_id"], "prediction": clean(row["text"])} for row in rows]
