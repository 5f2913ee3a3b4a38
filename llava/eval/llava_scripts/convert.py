"""LLaVA's converters: answer files in, what a scorer or a server takes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.tasks import gqa, mmbench, mme, open_ended, seed_bench, vizwiz, vqav2
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import (
    check_ids,
    question_key,
    read_answers,
    read_intact_answers,
    read_jsonl,
)
from llava.eval.tasks.tsv import read_table, write_xlsx
from llava.storage import write_atomically


def convert_gqa(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_gqa_for_eval.py`."""
    parser = OneLineParser(
        prog="convert_gqa_for_eval.py",
        description="GQA: the predictions that its evaluation script takes.",
    )
    parser.add_argument("--src", type=Path, required=True, help="answers, one JSON object a line")
    parser.add_argument("--dst", type=Path, required=True, help="predictions to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        write_atomically(args.dst, json.dumps(gqa.predictions(read_answers(args.src).values())))
    return 0


def convert_mmbench(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_mmbench_for_submission.py`."""
    parser = OneLineParser(
        prog="convert_mmbench_for_submission.py",
        description="MMBench: the spreadsheet that its server takes, from an answer file and the "
        "annotation table.",
    )
    parser.add_argument("--annotation-file", type=Path, required=True, help="MMBench's TSV file")
    parser.add_argument("--result-dir", type=Path, required=True)
    parser.add_argument("--upload-dir", type=Path, required=True)
    parser.add_argument("--experiment", required=True, help="RESULT_DIR/EXPERIMENT.jsonl is read")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        table = read_table(args.annotation_file, columns=("index",))
        results = args.result_dir / f"{args.experiment}.jsonl"
        answers = {name: row["text"] for name, row in read_answers(results).items()}
        check_ids(answers, table.typed("index"), results, args.annotation_file)
        columns, rows = mmbench.sheet(table, answers)
        write_xlsx(args.upload_dir / f"{args.experiment}.xlsx", columns, rows)
    return 0


def convert_mme(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `convert_answer_to_mme.py`.

    Reads DIR/answers/EXPERIMENT.jsonl and DIR/MME_Benchmark_release_version, writes
    DIR/eval_tool/answers/EXPERIMENT/CATEGORY.txt; `python -m llava.eval.eval_mme` scores them.
    """
    parser = OneLineParser(
        prog="convert_answer_to_mme.py",
        description="MME: its release of questions and answers, and the text files that its "
        "calculation reads.",
    )
    parser.add_argument("--experiment", required=True, help="name of the answer file")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder of MME (default: this)")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        answers = args.dir / "answers" / f"{args.experiment}.jsonl"
        rows = read_jsonl(answers, texts=("question_id", "prompt", "text"))
        lines = mme.mme_lines(
            rows, mme.read_truth(args.dir / "MME_Benchmark_release_version", "mme")
        )
        mme.write_categories(args.dir / "eval_tool" / "answers" / args.experiment, lines)
    return 0


def convert_mmvet(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_mmvet_for_eval.py`."""
    parser = OneLineParser(
        prog="convert_mmvet_for_eval.py",
        description="MM-Vet: the JSON file that its GPT-4 grader takes.",
    )
    parser.add_argument("--src", type=Path, required=True, help="answers, one JSON object a line")
    parser.add_argument("--dst", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        rows = read_answers(args.src).values()
        write_atomically(
            args.dst, open_ended.mmvet_submission((row["question_id"], row["text"]) for row in rows)
        )
    return 0


def convert_seed_bench(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_seed_for_submission.py`."""
    parser = OneLineParser(
        prog="convert_seed_for_submission.py",
        description="SEED-Bench: print accuracies by question type, and write the file its "
        "leaderboard takes.",
    )
    parser.add_argument("--annotation-file", type=Path, required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--result-upload-file", type=Path, required=True)
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        questions, types = seed_bench.read_annotations(args.annotation_file)
        answers = {name: row["text"] for name, row in read_answers(args.result_file).items()}
        known = [question_key(row["question_id"]) for row in questions]
        check_ids(answers, known, args.result_file, args.annotation_file)
        right = [
            name in answers and seed_bench.is_correct(answers[name], question["answer"])
            for name, question in zip(known, questions, strict=True)
        ]
        for line in seed_bench.report(questions, types, right):
            print(line)
        missing = [name for name in known if name not in answers]
        if missing:
            raise TaskError(
                f"{args.result_file} has no answer to {len(missing)} of {len(known)} questions "
                f"(first: {missing[0]!r}), so no upload file is written; answer all of them"
            )
        texts = [answers[name] for name in known]
        write_atomically(args.result_upload_file, seed_bench.upload(questions, texts))
    return 0


def convert_vizwiz(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_vizwiz_for_submission.py`."""
    parser = OneLineParser(
        prog="convert_vizwiz_for_submission.py", description="VizWiz: what its server takes."
    )
    parser.add_argument("--annotation-file", type=Path, required=True, help="llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="answers, JSON lines")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        results, damaged = read_intact_answers(args.result_file)
        split = read_jsonl(args.annotation_file, ids=("question_id",), texts=("image",))
        print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
        write_atomically(args.result_upload_file, json.dumps(vizwiz.submission(split, results)))
    return 0


def convert_vqav2(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `scripts/convert_vqav2_for_submission.py`.

    Reads DIR/answers/SPLIT/CKPT/merge.jsonl, writes DIR/answers_upload/SPLIT/CKPT.json.
    """
    parser = OneLineParser(
        prog="convert_vqav2_for_submission.py",
        description="VQAv2: what its server takes, every question of the whole test split.",
    )
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
        write_atomically(target, json.dumps(vqav2.submission(split, results)))
    return 0
