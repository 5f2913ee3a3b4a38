"""SEED-Bench: print accuracies by question type, and write the file its leaderboard takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import question_key, read_answers
from llava.eval.scorers.seed_bench import Tally, by_type, is_correct, total
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import check_ids, check_listed, is_id, read_json
from llava.storage import write_atomically

TEXTS = ("data_type", "answer")
DATA_TYPES = ("image", "video")


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_seed_for_submission.py`."""
    parser = OneLineParser(prog="convert_seed_for_submission.py", description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--result-upload-file", type=Path, required=True)
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        questions, types = read_annotations(args.annotation_file)
        answers = {name: row["text"] for name, row in read_answers(args.result_file).items()}
        known = [question_key(row["question_id"]) for row in questions]
        check_ids(answers, known, args.result_file, args.annotation_file)
        right = [
            name in answers and is_correct(answers[name], question["answer"])
            for name, question in zip(known, questions, strict=True)
        ]
        for line in report(questions, types, right):
            print(line)
        missing = [name for name in known if name not in answers]
        if missing:
            raise TaskError(
                f"{args.result_file} has no answer to {len(missing)} of {len(known)} questions "
                f"(first: {missing[0]!r}), so no upload file is written; answer all of them"
            )
        texts = [answers[name] for name in known]
        write_atomically(args.result_upload_file, upload(questions, texts))
    return 0


def read_annotations(
    path: Path, task: str | None = None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The questions of `SEED-Bench.json` and {question type: its name}. Raises TaskError."""
    content = read_json(path, task)
    questions = content.get("questions") if isinstance(content, dict) else None
    types = content.get("question_type") if isinstance(content, dict) else None
    if not isinstance(questions, list) or not questions or not isinstance(types, dict):
        raise TaskError(f"{path} must hold `questions` and `question_type`; is it SEED-Bench.json?")
    if not all(isinstance(kind, int) and is_id(kind) for kind in types.values()):
        raise TaskError(f"`question_type` of {path} must give every type a number")
    names = {kind: name for name, kind in types.items()}
    seen = set()
    check_listed(questions, "question", path, ids=("question_id", "question_type_id"), texts=TEXTS)
    for number, question in enumerate(questions, start=1):
        where = f"question {number} of {path}"
        if question["data_type"] not in DATA_TYPES:
            raise TaskError(
                f"data_type in {where} is {question['data_type']!r}; one of {', '.join(DATA_TYPES)}"
            )
        if question["question_type_id"] not in names:
            raise TaskError(
                f"question_type_id in {where} is {question['question_type_id']!r}, which "
                "`question_type` does not name"
            )
        key = question_key(question["question_id"])
        if key in seen:
            raise TaskError(f"{where} has the question_id {key!r} of one before it; keep one")
        seen.add(key)
    return questions, names


def report(
    questions: Sequence[Mapping[str, Any]], types: Mapping[int, str], right: Sequence[bool]
) -> list[str]:
    """The lines that LLaVA prints: each type, all, images, videos."""
    lines = [f"{types[kind]}: {_percent(row)}" for kind, row in by_type(questions, right).items()]
    return [
        *lines,
        f"Total accuracy: {_percent(total(questions, right))}",
        f"image accuracy: {_percent(total(questions, right, 'image'))}",
        f"video accuracy: {_percent(total(questions, right, 'video'))}",
    ]


def upload(questions: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> str:
    """The upload file: one line a question, in the annotation's order, with the ids as it has."""
    rows = zip(questions, answers, strict=True)
    return "".join(
        json.dumps({"question_id": question["question_id"], "prediction": text}) + "\n"
        for question, text in rows
    )


def _percent(tally: Tally) -> str:
    return "n/a" if tally.percent is None else f"{tally.percent:.2f}%"
