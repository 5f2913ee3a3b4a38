"""VQAv2: what its server takes, every question of the whole test split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import Row, read_intact_answers, write_json
from llava.eval.rules.vqa import normalise
from llava.eval.tasks.files import read_jsonl


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_vqav2_for_submission.py`.

    Reads DIR/answers/SPLIT/CKPT/merge.jsonl, writes DIR/answers_upload/SPLIT/CKPT.json.
    """
    parser = OneLineParser(prog="convert_vqav2_for_submission.py", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("playground/data/eval/vqav2"))
    parser.add_argument("--ckpt", required=True, help="name of the model's folder of answers")
    parser.add_argument("--split", required=True, help="such as llava_vqav2_mscoco_test-dev2015")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        answers = args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
        results, damaged = read_intact_answers(answers)
        split_file = args.dir / "llava_vqav2_mscoco_test2015.jsonl"
        split = read_jsonl(split_file, "vqav2", ids=("question_id",))
        print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
        target = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
        write_json(target, submission(split, results))
    return 0


def submission(split: Iterable[Row], results: Mapping[Any, str]) -> list[Row]:
    """[{question_id, answer}] for every question of `split`, "" where there is no result."""
    names = [row["question_id"] for row in split]
    return [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]
