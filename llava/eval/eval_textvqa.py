"""Score TextVQA answer files: `python -m llava.eval.eval_textvqa --annotation-file ...`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.rules.vqa import textvqa_accuracy
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import read_json, read_jsonl
from llava.eval.tasks.textvqa import answers_by_question, answers_for


def main(argv: Sequence[str] | None = None) -> int:
    """Print the accuracy of each file; 0, or 2 with one line on stderr for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.result_file is None and args.result_dir is None:
        parser.error("nothing to score; give --result-file or --result-dir")
    with one_line_errors(parser):
        if args.result_file is not None:
            print_accuracy(args.annotation_file, args.result_file)
        if args.result_dir is not None:
            for file in sorted(args.result_dir.iterdir()):
                if file.suffix == ".jsonl":
                    print_accuracy(args.annotation_file, file)
                else:
                    print(f"Skipping {file.name}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="llava.eval.eval_textvqa", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--annotation-file", type=Path, required=True, help="TextVQA_0.5.1_val.json")
    add("--result-file", type=Path, help="answers: JSON lines {question_id, prompt, text}")
    add("--result-dir", type=Path, help="folder of such files, ending in .jsonl")
    return parser


def print_accuracy(annotation_file: Path, result_file: Path) -> None:
    """Name of the file, number of its answers and their mean accuracy in percent."""
    scores = accuracies(annotation_file, result_file)
    print(result_file.stem)
    mean = 100 * math.fsum(scores) / len(scores)
    print(f"Samples: {len(scores)}\nAccuracy: {mean:.2f}%\n")


def accuracies(annotation_file: Path, result_file: Path) -> list[float]:
    """Accuracy in [0, 1] of every answer, in the order of the file."""
    content = read_json(annotation_file)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise TaskError(f"{annotation_file} holds no list of annotations under data")
    known = answers_by_question(content["data"], annotation_file)
    rows = read_jsonl(result_file, ids=("question_id",), texts=("prompt", "text"))
    if not rows:
        raise TaskError(f"{result_file} holds no answer")
    return [
        textvqa_accuracy(row["text"], answers_for(known, row["question_id"], row["prompt"]))
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
