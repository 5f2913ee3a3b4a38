"""GQA: the predictions that its evaluation script takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import Row, read_answers, write_json
from llava.eval.scorers.gqa import clean


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_gqa_for_eval.py`."""
    parser = OneLineParser(prog="convert_gqa_for_eval.py", description=__doc__)
    parser.add_argument("--src", type=Path, required=True, help="answers, one JSON object a line")
    parser.add_argument("--dst", type=Path, required=True, help="predictions to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        write_json(args.dst, predictions(read_answers(args.src).values()))
    return 0


def predictions(rows: Iterable[Row]) -> list[Row]:
    """[{questionId, prediction}] for GQA's scorer."""
    return [{"questionId": row["question_id"], "prediction": clean(row["text"])} for row in rows]
