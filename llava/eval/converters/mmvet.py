"""MM-Vet: the JSON file that its GPT-4 grader takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import read_answers
from llava.storage import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_mmvet_for_eval.py`."""
    parser = OneLineParser(prog="convert_mmvet_for_eval.py", description=__doc__)
    parser.add_argument("--src", type=Path, required=True, help="answers, one JSON object a line")
    parser.add_argument("--dst", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        rows = read_answers(args.src).values()
        write_atomically(args.dst, submission((row["question_id"], row["text"]) for row in rows))
    return 0


def submission(answers: Iterable[tuple[str | int, str]]) -> str:
    """The JSON text `{"v1_<question id>": answer}`."""
    return json.dumps({f"v1_{name}": text for name, text in answers}, indent=2)
