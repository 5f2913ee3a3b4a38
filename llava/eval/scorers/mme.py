"""MME: two yes/no questions per image, scored by accuracy plus "both right".

Source: the evaluation tool of MME (Fu et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Literal

from llava.eval.tasks.base import Metric
from llava.utils import UserInputError

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
CATEGORY_MAXIMUM = 200.0
YES_OR_NO = "Please answer yes or no."

Key = tuple[str, str, str]

_INSTRUCTION = "Answer the question using a single word or phrase."


def decide(text: str) -> Literal["yes", "no", "other"]:
    """MME's reading of an answer: "yes", else "no", among its first four characters."""
    head = text.lower()[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


def category_score(right: Sequence[Sequence[bool]]) -> Metric:
    """100 x accuracy + 100 x share of images with both answers right, of one category.

    `right` [images, 2] says which answers are. The score is the mean over images of 50 points for
    each right answer and 100 more for both; its standard error is that of this mean.
    """
    points = [50.0 * sum(pair) + 100.0 * all(pair) for pair in right]
    count = len(points)
    mean = math.fsum(points) / count
    squares = math.fsum((value - mean) ** 2 for value in points)
    se = math.sqrt(squares / (count - 1) / count) if count > 1 else None
    return Metric(mean, se, 2 * count, CATEGORY_MAXIMUM)


def total(scores: Iterable[Metric]) -> Metric:
    """Sum of category scores; their errors count as independent, they are about other images."""
    scores = list(scores)
    errors = [score.se for score in scores]
    known = [error for error in errors if error is not None]
    return Metric(
        math.fsum(score.value for score in scores),
        math.hypot(*known) if len(known) == len(errors) else None,
        sum(score.n for score in scores),
        math.fsum(score.scale for score in scores),
    )


def question_key(question_id: str, prompt: str, truth: Container[Key]) -> Key:
    """(category, text file, question) under which MME's own files know LLaVA's `prompt`.

    LLaVA replaces "Please answer yes or no." by its own instruction. MME has one or two spaces in
    front of it, so whichever of the two is in `truth` is meant.

    Raises UserInputError where `truth` has neither.
    """
    category, name = question_id.split("/")[0], question_id.split("/")[-1]
    file = name.split(".")[0] + ".txt"
    question = prompt.replace(_INSTRUCTION, "").strip() if _INSTRUCTION in prompt else prompt
    if YES_OR_NO not in question:
        one_space = f"{question} {YES_OR_NO}"
        known = (category, file, one_space) in truth
        question = one_space if known else f"{question}  {YES_OR_NO}"
    if (category, file, question) not in truth:
        raise UserInputError(
            f"MME's {category}/{file} does not ask {question!r}; do the question file and "
            "MME_Benchmark_release_version belong together?"
        )
    return category, file, question
