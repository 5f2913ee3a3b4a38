"""GQA's accuracy: exact match on the balanced questions.

Source: the evaluation script of GQA (Hudson and Manning, 2019). Its validity and plausibility need
files that version 1.2 of the dataset does not hold, and LLaVA's protocol leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.utils import UserInputError


@dataclass(frozen=True)
class Judged:
    """One balanced question: 1.0 if the prediction is the gold answer, else 0.0.

    `open` questions (structural type "query") ask for a word; the others are called binary.
    """

    question_id: str
    image: str
    open: bool
    correct: float


def clean(text: str) -> str:
    """An answer in the form in which LLaVA compares it: lower case, no periods at its end."""
    return text.rstrip(".").lower()


def judge(questions: Mapping[str, Any], predictions: Mapping[str, str]) -> list[Judged]:
    """Every balanced question of `questions`, in their order.

    Args:
        questions: {id: {isBalanced, answer, imageId, types: {structural}}}, GQA's question file.
        predictions: {id: `clean` answer}.

    Raises:
        UserInputError: a balanced question has no prediction; one figure over the rest would not
            be GQA's.
    """
    balanced = {name: row for name, row in questions.items() if row["isBalanced"]}
    missing = [name for name in balanced if name not in predictions]
    if missing:
        raise UserInputError(
            f"no prediction for {len(missing)} of {len(balanced)} balanced GQA questions, the "
            f"first is {missing[0]}; predict all questions"
        )
    return [
        Judged(
            name,
            row["imageId"],
            row["types"]["structural"] == "query",
            float(predictions[name] == row["answer"]),
        )
        for name, row in balanced.items()
    ]
