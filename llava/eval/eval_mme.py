"""Score MME answers: `python -m llava.eval.eval_mme --results_dir eval_tool/answers/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.tasks.base import Metric, TaskError
from llava.eval.tasks.mme import (
    COGNITION,
    PERCEPTION,
    category_score,
    decide,
    read_lines,
    total,
)

TYPES = {"Perception": PERCEPTION, "Cognition": COGNITION}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores as MME's tool does; 0, or 2 with one line on stderr for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        for title, categories in TYPES.items():
            scores = {name: read_score(args.results_dir / f"{name}.txt") for name in categories}
            print("===========", title, "===========")
            print("total score:", total(scores.values()).value, "\n")
            for name, score in scores.items():
                print("\t", name, " score:", score.value)
            print("\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="llava.eval.eval_mme", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results_dir", type=Path, required=True, help="folder of CATEGORY.txt, tab-separated"
    )
    return parser


def read_score(path: Path) -> Metric:
    """Score of one category from lines "file, question, truth, answer", two after two an image."""
    lines = enumerate(read_lines(path), start=1)
    right = [_is_right(line, f"line {number} of {path}") for number, line in lines]
    if len(right) % 2:
        raise TaskError(f"{path} holds {len(right)} lines; MME asks two questions about an image")
    return category_score([right[at : at + 2] for at in range(0, len(right), 2)])


def _is_right(line: str, where: str) -> bool:
    fields = line.split("\t")
    if len(fields) != 4:
        raise TaskError(
            f"{where} has {len(fields)} fields instead of file, question, truth, answer"
        )
    truth = fields[2].lower()
    if truth not in ("yes", "no"):
        raise TaskError(f"{where} has the truth {fields[2]!r} instead of Yes or No")
    return decide(fields[3]) == truth


if __name__ == "__main__":
    sys.exit(main())
