"""Answer files as LLaVA writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import read_jsonl


def question_key(name: str | int) -> str | int:
    """The id as a number where it is one: files write 7 and "7" for the same question."""
    try:
        return int(name)
    except ValueError:
        return name


def read_answers(path: Path, keys: Sequence[str] = ()) -> dict[str | int, dict[str, Any]]:
    """{question id, by `question_key`: answer line} in file order.

    Several rounds of one question (`round_id`) are no duplicates; the last one of them stays.

    Raises:
        TaskError: the file is missing or damaged, a line lacks `text`, `question_id` or one of
            `keys`, or a question is answered twice.
    """
    answers: dict[str | int, dict[str, Any]] = {}
    seen = set()
    for row in read_jsonl(path, keys=("question_id", "text", *keys)):
        name = row["question_id"]
        if not isinstance(name, str | int) or not isinstance(row["text"], str):
            raise TaskError(f"{path} is damaged: the answer to question {name!r} is no text")
        name, place = question_key(name), (question_key(name), str(row.get("round_id", 0)))
        if place in seen:
            raise TaskError(f"{path} answers question {name!r} twice; keep one of the two lines")
        seen.add(place)
        answers[name] = row
    return answers
