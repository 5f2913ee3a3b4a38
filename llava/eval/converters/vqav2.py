"""VQAv2: what its server takes, every question of the whole test split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava.eval.converters.answers import Row
from llava.eval.scorers.evalai import normalise


def submission(split: Iterable[Row], results: Mapping[Any, str]) -> list[Row]:
    """[{question_id, answer}] for every question of `split`, "" where there is no result."""
    names = [row["question_id"] for row in split]
    return [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]
