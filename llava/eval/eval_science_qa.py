"""`python -m llava.eval.eval_science_qa`: score a ScienceQA answer file, with LLaVA's flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import read_answers
from llava.eval.scorers.science_qa import LETTERS, evaluate, image_accuracy
from llava.eval.tasks.files import check_ids
from llava.eval.tasks.scienceqa import read_split
from llava.storage import write_atomically


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
        rows = read_answers(args.result_file, texts=("prompt",)).values()
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


if __name__ == "__main__":
    sys.exit(main())
