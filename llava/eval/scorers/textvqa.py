"""TextVQA's pairing of results with annotations, as LLaVA's evaluation does it.

A result carries the image's id and the prompt; the question is recovered from the prompt, and
(image id, question) finds the human answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.utils import UserInputError

PEOPLE = 10  # who answered each question
OCR_LINE = "Reference OCR token: "

_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)

Key = tuple[Any, str]


def question_in(prompt: str) -> str:
    """The question that `prompt` asks, in lower case.

    Three forms exist: the question, an OCR line (before or after it) and the instruction, each on
    a line; the question and the instruction; and "OCR tokens: ... Question: ... Short answer:".

    Raises UserInputError for any other form.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := _OLD_PROMPT.search(prompt):
            return found[1].lower()
    elif OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_LINE.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserInputError(
        f"cannot find the question in the TextVQA prompt {prompt!r}; expected a line with it, "
        f"perhaps a line {OCR_LINE!r}, and a line with the instruction"
    )


def answers_by_question(
    annotations: Iterable[Mapping[str, Any]], file: Path | None = None
) -> dict[Key, list[str]]:
    """{(image id, lower-case question): human answers} of the `data` of an annotation file.

    Where two annotations share the key the later one counts, as in the published code. Raises
    UserInputError, naming `file`, for one that is not a TextVQA annotation.
    """
    found = {}
    for number, row in enumerate(annotations, start=1):
        what = (f"{file}: " if file else "") + f"TextVQA annotation {number}"
        try:
            key, answers = (row["image_id"], row["question"].lower()), row["answers"]
            if not isinstance(answers, list):
                raise TypeError("answers are no list")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"{what} lacks image_id, question or answers") from error
        named = isinstance(key[0], str | int) and not isinstance(key[0], bool)
        if not named or not all(isinstance(text, str) for text in answers):
            raise UserInputError(f"{what} is damaged: its image_id or an answer is no text")
        if len(answers) != PEOPLE:
            raise UserInputError(
                f"{what} holds {len(answers)} answers instead of {PEOPLE}; "
                "only the splits train and val come with answers"
            )
        found[key] = answers
    return found


def answers_for(known: Mapping[Key, list[str]], image_id: Any, prompt: str) -> list[str]:
    """The human answers to a prompt. Raises UserInputError where no annotation asks that."""
    question = question_in(prompt)
    if (image_id, question) not in known:
        raise UserInputError(
            f"no TextVQA annotation of image {image_id!r} asks {question!r}; do results and "
            "annotations belong to one split?"
        )
    return known[image_id, question]
