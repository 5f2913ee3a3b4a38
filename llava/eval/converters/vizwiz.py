"""VizWiz: what its server takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import Row, read_intact_answers, write_json
from llava.eval.rules.vqa import normalise
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import read_jsonl


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_vizwiz_for_submission.py`."""
    parser = OneLineParser(prog="convert_vizwiz_for_submission.py", description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True, help="llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="answers, JSON lines")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        results, damaged = read_intact_answers(args.result_file)
        split = read_jsonl(args.annotation_file, ids=("question_id",), texts=("image",))
        print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
        write_json(args.result_upload_file, submission(split, results))
    return 0


def submission(split: Sequence[Row], results: Mapping[Any, str]) -> list[Row]:
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
