"""SEED-Bench as LLaVA scores it: the answer is the letter and nothing else.

Source: behaviour of LLaVA's `convert_seed_for_submission`. "a" and "A." are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def is_correct(text: str, letter: str) -> bool:
    """Whether `text` is exactly the letter of the right option."""
    return text == letter


@dataclass(frozen=True)
class Tally:
    """`correct` of `total` questions."""

    correct: int
    total: int

    @property
    def percent(self) -> float | None:
        """Accuracy x 100; None without questions."""
        return self.correct / self.total * 100 if self.total else None


def by_type(questions: Sequence[Mapping[str, Any]], right: Sequence[bool]) -> dict[int, Tally]:
    """{question type: tally}, types ascending."""
    groups: dict[int, list[bool]] = {}
    for question, value in zip(questions, right, strict=True):
        groups.setdefault(question["question_type_id"], []).append(value)
    return {kind: Tally(sum(groups[kind]), len(groups[kind])) for kind in sorted(groups)}


def total(
    questions: Sequence[Mapping[str, Any]], right: Sequence[bool], data_type: str | None = None
) -> Tally:
    """Tally of all questions, or of those about an `image` or a `video`."""
    chosen = [
        value
        for question, value in zip(questions, right, strict=True)
        if data_type in (None, question["data_type"])
    ]
    return Tally(sum(chosen), len(chosen))
