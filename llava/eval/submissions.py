"""What LLaVA hands to the scorers and servers of benchmarks, made from its answer files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.results import write_atomically
from llava.eval.scorers.evalai import normalise
from llava.eval.scorers.gqa import clean
from llava.eval.scorers.mme import Key, question_key
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import index_by, read_bytes, read_jsonl

Row = dict[str, Any]


def read_results(path: Path) -> list[Row]:
    """Lines {question_id, text} of an answer file; TaskError if one is damaged or repeated."""
    rows = read_jsonl(path, keys=("question_id", "text"))
    index_by(rows, "question_id", path)
    return rows


def read_intact_results(path: Path) -> tuple[dict[Any, str], int]:
    """({question id: text}, damaged lines) of an answer file whose damaged lines are left out.

    LLaVA's converters for servers count lines that are not JSON and go on; so does this. Raises
    TaskError for an id that stands twice and for a line without question_id or text.
    """
    rows, damaged = [], 0
    content = read_bytes(path)
    for line in content.removesuffix(b"\n").split(b"\n") if content else []:
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except ValueError:
            damaged += 1
            continue
        if not isinstance(rows[-1], dict) or not {"question_id", "text"} <= rows[-1].keys():
            raise TaskError(f"record {len(rows)} of {path} lacks question_id or text")
    return {name: row["text"] for name, row in index_by(rows, "question_id", path).items()}, damaged


def gqa_predictions(rows: Iterable[Row]) -> list[Row]:
    """[{questionId, prediction}] for GQA's scorer."""
    return [{"questionId": row["question_id"], "prediction": clean(row["text"])} for row in rows]


def vqav2_submission(split: Iterable[Row], results: Mapping[Any, str]) -> list[Row]:
    """[{question_id, answer}] for every question of `split`, "" where there is no result."""
    names = [row["question_id"] for row in split]
    return [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]


def vizwiz_submission(split: Sequence[Row], results: Mapping[Any, str]) -> list[Row]:
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


def mme_lines(rows: Iterable[Row], truth: Mapping[Key, str]) -> dict[str, list[str]]:
    """{category: lines "file, question, truth, answer" joined by tabs} for MME's scorer.

    Args:
        rows: {question_id: "category/image", prompt, text}, the two of an image side by side.
        truth: {(category, text file, question): answer}, MME's own files.

    Raises:
        UserInputError: MME does not ask such a question.
    """
    lines = defaultdict(list)
    for row in rows:
        category, file, question = question_key(row["question_id"], row["prompt"], truth)
        answer = " ".join(row["text"].splitlines()).replace("\t", " ")  # keep to one field
        line = (file, question, truth[category, file, question], answer)
        lines[category].append("\t".join(line))
    return dict(lines)


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    """Write `rows` as the one line of JSON that LLaVA's converters write."""
    write_atomically(path, json.dumps(rows))
    return path
