"""Score POPE answers: `python -m llava.eval.eval_pope --annotation-dir ... --result-file ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import (
    Row,
    as_json,
    check_ids,
    index_by,
    numbered_jsonl,
    read_answers,
    read_jsonl,
)
from llava.eval.tasks.pope import Answer, Confusion, count, decide

PREFIX, SUFFIX = "coco_pope_", ".json"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts and figures of each split; 0, or 2 with one line for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        results = confusions(args.annotation_dir, args.question_file, args.result_file)
        for category, confusion in results.items():
            print_figures(category, confusion)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="llava.eval.eval_pope", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--annotation-dir", type=Path, required=True, help="folder of coco_pope_SPLIT.json")
    add("--question-file", type=Path, required=True, help="llava_pope_test.jsonl")
    add("--result-file", type=Path, required=True, help="answers: JSON lines {question_id, text}")
    return parser


def confusions(
    annotation_dir: Path, question_file: Path, result_file: Path
) -> dict[str, Confusion]:
    """{split: counts} for every label file of the folder, by the split's name.

    Labels are paired with answers by their order in the split. Raises TaskError where that order
    or the numbers do not agree, which the published code does not look at.
    """
    lines = read_jsonl(question_file, ids=("question_id",), texts=("category",))
    questions = index_by(lines, "question_id", question_file)
    answers = list(read_answers(result_file).values())
    given = [row["question_id"] for row in answers]
    check_ids(given, questions, result_file, question_file)
    place = {name: number for number, name in enumerate(questions)}
    found = {}
    paths = sorted(annotation_dir.iterdir())
    if not paths:
        raise TaskError(f"{annotation_dir} holds no label file {PREFIX}SPLIT{SUFFIX}")
    for path in paths:
        if not path.name.startswith(PREFIX) or path.suffix != SUFFIX:
            raise TaskError(f"{path} is no label file; keep only {PREFIX}SPLIT{SUFFIX} there")
        split = path.stem.removeprefix(PREFIX)
        own = [row for row in answers if questions[row["question_id"]]["category"] == split]
        places = [place[row["question_id"]] for row in own]
        if places != sorted(places):
            raise TaskError(
                f"the answers about {split} in {result_file} are not in the order of "
                f"{question_file}, and POPE pairs answers with labels by their order; sort them"
            )
        found[split] = _confusion(own, path, result_file)
    return found


def print_figures(category: str, confusion: Confusion) -> None:
    """The lines of LLaVA's evaluation, the last one holds F1, accuracy, P, R and yes-ratio."""
    total = confusion.tp + confusion.fp + confusion.tn + confusion.fn
    print(f"Category: {category}, # samples: {total}")
    print("TP\tFP\tTN\tFN\t")
    print(f"{confusion.tp}\t{confusion.fp}\t{confusion.tn}\t{confusion.fn}")
    if confusion.tp == 0:
        raise TaskError(
            f"no question of split {category} is rightly answered yes, so its F1 is undefined; "
            "POPE's own code stops here too"
        )
    print(f"Accuracy: {confusion.accuracy}")
    print(f"Precision: {confusion.precision}")
    print(f"Recall: {confusion.recall}")
    print(f"F1 score: {confusion.f1}")
    print(f"Yes ratio: {confusion.yes_ratio}")
    print(
        f"{confusion.f1:.3f}, {confusion.accuracy:.3f}, {confusion.precision:.3f}, "
        f"{confusion.recall:.3f}, {confusion.yes_ratio:.3f}"
    )
    print("=" * 36)


def _confusion(answers: Sequence[Row], path: Path, result_file: Path) -> Confusion:
    labels: list[Answer] = []
    for where, row in numbered_jsonl(path, keys=("label",)):
        if row["label"] not in ("yes", "no"):
            raise TaskError(f"label in {where} is {as_json(row['label'])}; yes or no")
        labels.append(row["label"])
    if len(labels) != len(answers) or not labels:
        raise TaskError(
            f"{path} holds {len(labels)} labels for {len(answers)} answers of {result_file}; is it "
            "the revision with 2,910 random questions, and is the answer file complete?"
        )
    return count([decide(row["text"]) for row in answers], labels)


if __name__ == "__main__":
    sys.exit(main())
