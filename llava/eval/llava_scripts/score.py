"""LLaVA's `eval_*`: print the figures of answer files as LLaVA and the benchmarks' tools do."""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.eval.llava_scripts import flag, path_flag, program
from llava.eval.rules.vqa import textvqa_accuracy
from llava.eval.tasks import mme, pope, scienceqa, textvqa
from llava.eval.tasks.base import Metric, TaskError
from llava.eval.tasks.files import (
    Kind,
    Row,
    as_json,
    check_ids,
    index_by,
    numbered_jsonl,
    read_answers,
    read_jsonl,
)
from llava.storage import write_atomically

MME_TYPES = {"Perception": mme.PERCEPTION, "Cognition": mme.COGNITION}
PROMPTED = {"question_id": Kind.ID, "prompt": Kind.TEXT, "text": Kind.TEXT}
LABELS_PREFIX, LABELS_SUFFIX = "coco_pope_", ".json"


@program("llava.eval.eval_mme", path_flag("--results_dir", "folder of CATEGORY.txt, tab-separated"))
def eval_mme(args: Namespace) -> None:
    """Score MME answers: `python -m llava.eval.eval_mme --results_dir eval_tool/answers/NAME`."""
    for title, categories in MME_TYPES.items():
        scores = {name: mme_score(args.results_dir / f"{name}.txt") for name in categories}
        print("===========", title, "===========")
        print("total score:", mme.total(scores.values()).value, "\n")
        for name, score in scores.items():
            print("\t", name, " score:", score.value)
        print("\n")


def mme_score(path: Path) -> Metric:
    """Score one category from lines "file, question, truth, answer", two after two an image."""
    lines = enumerate(mme.read_lines(path), start=1)
    right = [_is_right(line, f"line {number} of {path}") for number, line in lines]
    if len(right) % 2:
        raise TaskError(f"{path} holds {len(right)} lines; MME asks two questions about an image")
    return mme.category_score([right[at : at + 2] for at in range(0, len(right), 2)])


def _is_right(line: str, where: str) -> bool:
    fields = line.split("\t")
    if len(fields) != 4:
        raise TaskError(
            f"{where} has {len(fields)} fields instead of file, question, truth, answer"
        )
    truth = fields[2].lower()
    if truth not in ("yes", "no"):
        raise TaskError(f"{where} has the truth {fields[2]!r} instead of Yes or No")
    return mme.decide(fields[3]) == truth


@program(
    "llava.eval.eval_pope",
    path_flag("--annotation-dir", "folder of coco_pope_SPLIT.json"),
    path_flag("--question-file", "llava_pope_test.jsonl"),
    path_flag("--result-file", "answers: JSON lines {question_id, text}"),
)
def eval_pope(args: Namespace) -> None:
    """Score POPE answers: `python -m llava.eval.eval_pope --annotation-dir ...`."""
    results = pope_confusions(args.annotation_dir, args.question_file, args.result_file)
    for category, confusion in results.items():
        print_pope(category, confusion)


def pope_confusions(
    annotation_dir: Path, question_file: Path, result_file: Path
) -> dict[str, pope.Confusion]:
    """Count right and wrong answers for every label file of the folder: {split: counts}.

    Labels are paired with answers by their order in the split.

    Raises:
        TaskError: that order or the numbers do not agree, which the published code does not check.
    """
    lines = read_jsonl(question_file, fields={"question_id": Kind.ID, "category": Kind.TEXT})
    questions = index_by(lines, "question_id", question_file)
    answers = list(read_answers(result_file).values())
    check_ids((row["question_id"] for row in answers), questions, result_file, question_file)
    place = {name: number for number, name in enumerate(questions)}
    found = {}
    paths = sorted(annotation_dir.iterdir())
    if not paths:
        raise TaskError(
            f"there is no label file {LABELS_PREFIX}SPLIT{LABELS_SUFFIX} in {annotation_dir}"
        )
    for path in paths:
        if not path.name.startswith(LABELS_PREFIX) or path.suffix != LABELS_SUFFIX:
            raise TaskError(
                f"{path} is not a label file; keep only {LABELS_PREFIX}SPLIT{LABELS_SUFFIX} there"
            )
        split = path.stem.removeprefix(LABELS_PREFIX)
        own = [row for row in answers if questions[row["question_id"]]["category"] == split]
        places = [place[row["question_id"]] for row in own]
        if places != sorted(places):
            raise TaskError(
                f"the answers about {split} in {result_file} are not in the order of "
                f"{question_file}, and POPE pairs answers with labels by their order; sort them"
            )
        found[split] = _confusion(own, path, result_file)
    return found


def _confusion(answers: Sequence[Row], path: Path, result_file: Path) -> pope.Confusion:
    labels: list[pope.Answer] = []
    for where, row in numbered_jsonl(path, fields={"label": Kind.ANY}):
        if row["label"] not in ("yes", "no"):
            raise TaskError(f"label in {where} is {as_json(row['label'])}; use yes or no")
        labels.append(row["label"])
    if len(labels) != len(answers) or not labels:
        raise TaskError(
            f"{path} holds {len(labels)} labels for {len(answers)} answers of {result_file}; is it "
            "the revision with 2,910 random questions, and is the answer file complete?"
        )
    return pope.count([pope.decide(row["text"]) for row in answers], labels)


def print_pope(category: str, confusion: pope.Confusion) -> None:
    """Print the lines of LLaVA's evaluation; the last holds F1, accuracy, P, R and yes-ratio."""
    counts = (confusion.tp, confusion.fp, confusion.tn, confusion.fn)
    print(f"Category: {category}, # samples: {sum(counts)}")
    print("TP\tFP\tTN\tFN\t")
    print(*counts, sep="\t")
    if confusion.tp == 0:
        raise TaskError(
            f"no question of split {category} is correctly answered yes, so its F1 is undefined; "
            "POPE's own code stops here too"
        )
    figures = {
        "Accuracy": confusion.accuracy,
        "Precision": confusion.precision,
        "Recall": confusion.recall,
        "F1 score": confusion.f1,
        "Yes ratio": confusion.yes_ratio,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    last = ("F1 score", "Accuracy", "Precision", "Recall", "Yes ratio")
    print(", ".join(f"{figures[name]:.3f}" for name in last))
    print("=" * 36)


@program(
    "llava.eval.eval_science_qa",
    path_flag("--base-dir", "folder of problems.json"),
    path_flag("--result-file", "answers, one JSON a line"),
    path_flag("--output-file", "right and wrong answers"),
    path_flag("--output-result", "summary"),
    flag("--split", default="test"),
    flag("--options", type=list, default=scienceqa.LETTERS, metavar="ABCDE"),
)
def eval_science_qa(args: Namespace) -> None:
    """Score a ScienceQA answer file: print LLaVA's line and write its two result files."""
    problems, split = scienceqa.read_split(args.base_dir, args.split)
    rows = read_answers(args.result_file, PROMPTED).values()
    answers = {str(row["question_id"]): row for row in rows}
    check_ids(answers, problems, args.result_file, args.base_dir / "problems.json")
    analysis, summary = scienceqa.evaluate(problems, split, answers, args.options)
    write_atomically(args.output_file, json.dumps(analysis, indent=2))
    write_atomically(args.output_result, json.dumps(summary, indent=2))
    images = scienceqa.image_accuracy(analysis)
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, "
        f"Accuracy: {summary['acc']:.2f}%, "
        f"IMG-Accuracy: {'n/a' if images is None else f'{images:.2f}%'}"
    )


@program(
    "llava.eval.eval_textvqa",
    path_flag("--annotation-file", "TextVQA_0.5.1_val.json"),
    path_flag("--result-file", "answers: JSON lines {question_id, prompt, text}", required=False),
    path_flag("--result-dir", "folder of such files, ending in .jsonl", required=False),
)
def eval_textvqa(args: Namespace) -> None:
    """Score TextVQA answer files: `python -m llava.eval.eval_textvqa --annotation-file ...`."""
    if args.result_file is None and args.result_dir is None:
        raise TaskError("nothing to score; give --result-file or --result-dir")
    if args.result_file is not None:
        print_textvqa(args.annotation_file, args.result_file)
    for file in [] if args.result_dir is None else sorted(args.result_dir.iterdir()):
        if file.suffix == ".jsonl":
            print_textvqa(args.annotation_file, file)
        else:
            print(f"Skipping {file.name}")


def print_textvqa(annotation_file: Path, result_file: Path) -> None:
    """Print the name of a file, the number of its answers and their mean accuracy in percent."""
    scores = textvqa_accuracies(annotation_file, result_file)
    print(result_file.stem)
    mean = 100 * math.fsum(scores) / len(scores)
    print(f"Samples: {len(scores)}\nAccuracy: {mean:.2f}%\n")


def textvqa_accuracies(annotation_file: Path, result_file: Path) -> list[float]:
    """Score every answer in [0, 1], in the order of the file."""
    known = textvqa.read_annotations(annotation_file)
    rows = read_jsonl(result_file, fields=PROMPTED)
    if not rows:
        raise TaskError(f"{result_file} has no answers")
    return [
        textvqa_accuracy(row["text"], textvqa.answers_for(known, row["question_id"], row["prompt"]))
        for row in rows
    ]
