"""LLaVA's `scripts/convert_*.py`: from answer files to what servers and graders take."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from llava.eval.llava_scripts import flag, path_flag, program
from llava.eval.tasks import gqa, mmbench, mme, open_ended, seed_bench, vizwiz, vqav2
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import (
    Kind,
    check_ids,
    read_answers,
    read_intact_answers,
    read_jsonl,
)
from llava.eval.tasks.tsv import read_table, write_xlsx
from llava.storage import write_atomically


def texts_of(answers: Path) -> dict[Any, str]:
    """Read {question id: answer} of an answer file.

    Raises:
        TaskError: the file cannot be used.
    """
    return {name: row["text"] for name, row in read_answers(answers).items()}


@program(
    "convert_answer_to_mme.py",
    flag("--experiment", required=True, help="name of the answer file"),
    path_flag("--dir", "folder of MME (default: this)", required=False, default=Path()),
)
def convert_mme(args: Namespace) -> None:
    """Write the text files that MME's calculation reads.

    Reads DIR/answers/EXPERIMENT.jsonl and DIR/MME_Benchmark_release_version, writes
    DIR/eval_tool/answers/EXPERIMENT/CATEGORY.txt; `python -m llava.eval.eval_mme` scores them.
    """
    answers = args.dir / "answers" / f"{args.experiment}.jsonl"
    rows = read_jsonl(
        answers, fields={"question_id": Kind.TEXT, "prompt": Kind.TEXT, "text": Kind.TEXT}
    )
    truth = mme.read_truth(args.dir / "MME_Benchmark_release_version", "mme")
    folder = args.dir / "eval_tool" / "answers" / args.experiment
    mme.write_categories(folder, mme.mme_lines(rows, truth))


@program(
    "convert_gqa_for_eval.py",
    path_flag("--src", "answers, one JSON object a line"),
    path_flag("--dst", "predictions to write"),
)
def convert_gqa(args: Namespace) -> None:
    """Write the predictions that GQA's evaluation script takes."""
    write_atomically(args.dst, json.dumps(gqa.predictions(read_answers(args.src).values())))


@program(
    "convert_mmbench_for_submission.py",
    path_flag("--annotation-file", "MMBench's TSV file"),
    path_flag("--result-dir"),
    path_flag("--upload-dir"),
    flag("--experiment", required=True, help="RESULT_DIR/EXPERIMENT.jsonl is read"),
)
def convert_mmbench(args: Namespace) -> None:
    """Write the spreadsheet that MMBench's server takes, from answers and the annotation table."""
    table = read_table(args.annotation_file, columns=("index",))
    results = args.result_dir / f"{args.experiment}.jsonl"
    answers = texts_of(results)
    check_ids(answers, table.typed("index"), results, args.annotation_file)
    columns, rows = mmbench.sheet(table, answers)
    write_xlsx(args.upload_dir / f"{args.experiment}.xlsx", columns, rows)


@program(
    "convert_mmvet_for_eval.py",
    path_flag("--src", "answers, one JSON object a line"),
    path_flag("--dst", "JSON file to write"),
)
def convert_mmvet(args: Namespace) -> None:
    """Write the JSON file that MM-Vet's GPT-4 grader takes."""
    rows = read_answers(args.src).values()
    answers = ((row["question_id"], row["text"]) for row in rows)
    write_atomically(args.dst, open_ended.mmvet_submission(answers))


@program(
    "convert_seed_for_submission.py",
    path_flag("--annotation-file", "SEED-Bench.json"),
    path_flag("--result-file"),
    path_flag("--result-upload-file"),
)
def convert_seed_bench(args: Namespace) -> None:
    """Print SEED-Bench's accuracies by question type; write the file its leaderboard takes."""
    questions, types = seed_bench.read_annotations(args.annotation_file)
    answers = texts_of(args.result_file)
    check_ids(answers, questions, args.result_file, args.annotation_file)
    right = [answers.get(name) == question["answer"] for name, question in questions.items()]
    print(*seed_bench.report(questions.values(), types, right), sep="\n")
    missing = [name for name in questions if name not in answers]
    if missing:
        raise TaskError(
            f"{args.result_file} has no answer to {len(missing)} of {len(questions)} questions "
            f"(first: {missing[0]!r}), so no upload file is written; answer all of them"
        )
    write_atomically(args.result_upload_file, seed_bench.upload(questions, answers))


@program(
    "convert_vizwiz_for_submission.py",
    path_flag("--annotation-file", "llava_test.jsonl"),
    path_flag("--result-file", "answers, JSON lines"),
    path_flag("--result-upload-file", "file to write"),
)
def convert_vizwiz(args: Namespace) -> None:
    """Write what VizWiz's server takes."""
    results, damaged = read_intact_answers(args.result_file)
    split = read_jsonl(args.annotation_file, fields={"question_id": Kind.ID, "image": Kind.TEXT})
    print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
    write_atomically(args.result_upload_file, json.dumps(vizwiz.submission(split, results)))


@program(
    "convert_vqav2_for_submission.py",
    path_flag("--dir", required=False, default=Path("playground/data/eval/vqav2")),
    flag("--ckpt", required=True, help="name of the model's folder of answers"),
    flag("--split", required=True, help="such as llava_vqav2_mscoco_test-dev2015"),
)
def convert_vqav2(args: Namespace) -> None:
    """Write what VQAv2's server takes: every question of the whole test split.

    Reads DIR/answers/SPLIT/CKPT/merge.jsonl, writes DIR/answers_upload/SPLIT/CKPT.json.
    """
    results, damaged = read_intact_answers(
        args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
    )
    questions = args.dir / "llava_vqav2_mscoco_test2015.jsonl"
    split = read_jsonl(questions, "vqav2", fields={"question_id": Kind.ID})
    print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
    target = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
    write_atomically(target, json.dumps(vqav2.submission(split, results)))
