"""`python -m llava.eval.eval_science_qa`: score a ScienceQA answer file, with LLaVA's flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import read_answers
from llava.eval.results import write_atomically
from llava.eval.scorers.science_qa import LETTERS, evaluate, image_accuracy
from llava.eval.tasks.files import check_ids, read_json
from llava.eval.tasks.question_file import TaskError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the line that LLaVA prints and write its two result files."""
    parser = OneLineParser(prog="llava.eval.eval_science_qa", description=__doc__)
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json")
    parser.add_argument("--result-file", type=Path, required=True, help="answers, one JSON a line")
    parser.add_argument("--output-file", type=Path, required=True, help="right and wrong answers")
    parser.add_argument("--output-result", type=Path, required=True, help="summary")
    parser.add_argument("--split", default="test")
    parser.add_argument("--options", type=list, default=LETTERS, metavar="ABCDE")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        problems, split = read_split(args.base_dir, args.split)
        rows = read_answers(args.result_file, keys=("prompt",)).values()
        answers = {str(row["question_id"]): row for row in rows}
        check_ids(answers, problems, args.result_file, args.base_dir / "problems.json")
        analysis, summary = evaluate(problems, split, answers, args.options)
        write_atomically(args.output_file, json.dumps(analysis, indent=2))
        write_atomically(args.output_result, json.dumps(summary, indent=2))
    images = image_accuracy(analysis)
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, "
        f"Accuracy: {summary['acc']:.2f}%, "
        f"IMG-Accuracy: {'n/a' if images is None else f'{images:.2f}%'}"
    )
    return 0


def read_split(
    folder: Path, split: str, task: str | None = None
) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """All problems of ScienceQA and the ids of one split. Raises TaskError for unusable files."""
    problems = read_json(folder / "problems.json", task)
    splits = read_json(folder / "pid_splits.json", task)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise TaskError(f"problems.json and pid_splits.json in {folder} must be JSON objects")
    if not splits.get(split):
        known = ", ".join(name for name in splits if splits[name])
        raise TaskError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {known}")
    check_ids(splits[split], problems, folder / "pid_splits.json", folder / "problems.json")
    for name in splits[split]:
        problem = problems[name]
        answer, choices = problem.get("answer"), problem.get("choices")
        if not isinstance(choices, list) or answer not in range(len(choices)):
            raise TaskError(
                f"problem {name} in {folder / 'problems.json'} is damaged: `answer` must be the "
                "index of one of its `choices`"
            )
    return problems, splits[split]


if __name__ == "__main__":
    sys.exit(main())
