"""Answer files as LLaVA writes them, and the JSON that its converters make of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import check_fields, index_by, read_bytes, read_jsonl
from llava.storage import write_atomically

Row = dict[str, Any]

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")  # Python refuses to read thousands of digits


def question_key(name: str | int) -> str | int:
    """The id as a number where it is one: files write 7 and "7" for the same question."""
    return int(name) if isinstance(name, int) or _INTEGER.fullmatch(name) else name


def read_answers(path: Path, texts: Sequence[str] = ()) -> dict[str | int, Row]:
    """{question id, by `question_key`: answer line} in file order.

    Several rounds of one question (`round_id`) are no duplicates; the last one of them stays.

    Raises:
        TaskError: the file is missing, damaged or empty, a line lacks `question_id`, `text` or a
            text under one of `texts`, or a question is answered twice.
    """
    answers: dict[str | int, Row] = {}
    seen = set()
    for row in read_jsonl(path, ids=("question_id",), texts=("text", *texts)):
        name = row["question_id"]
        name, place = question_key(name), (question_key(name), str(row.get("round_id", 0)))
        if place in seen:
            raise TaskError(f"{path} answers question {name!r} twice; keep one of the two lines")
        seen.add(place)
        answers[name] = row
    if not answers:
        raise TaskError(f"{path} holds no answer")
    return answers


def read_intact_answers(path: Path) -> tuple[dict[Any, str], int]:
    """({question id: text}, damaged lines) of an answer file whose damaged lines are left out.

    LLaVA's converters for servers count lines that are not JSON and go on; so does this. Raises
    TaskError for an id that stands twice and for a line without question_id or text.
    """
    rows, damaged = [], 0
    content = read_bytes(path)
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError):
            damaged += 1
            continue
        where = f"line {number} of {path}"
        check_fields(rows[-1], where, texts=("text",), ids=("question_id",))
    return {name: row["text"] for name, row in index_by(rows, "question_id", path).items()}, damaged


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    """Write `rows` as the one line of JSON that LLaVA's converters write."""
    write_atomically(path, json.dumps(rows))
    return path
