"""Demo files of the benchmarks that are answered with an option's letter."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path

from llava.eval.demo.files import (
    OPTION,
    encoded,
    lettered,
    write_json,
    write_lines,
    write_picture,
)
from llava.eval.demo.source import LETTERS, Asked, draw_questions

FAMILIES = ("color", "relation", "position", "count")
SEED_TYPES = {"color": 4, "relation": 6, "position": 3, "count": 5}
SEED_NAMES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Location": 3,
    "Instance Attributes": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}
MMMU_SUBJECTS = ("Art", "Accounting", "Biology", "Pharmacy", "History", "Electronics")
MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
)


def write_scienceqa(root: Path, count: int) -> None:
    """Every fourth question has no image, as in the published test split."""
    folder = root / "scienceqa"
    prompts, problems = [], {}
    for asked in draw_questions(FAMILIES, count, salt=10):
        name, options = str(asked.number + 1), asked.options()
        with_image = asked.number % 4 != 3
        listed = " ".join(
            f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)
        )
        human = f"Context: N/A\nQuestion: {asked.question}\nOptions: {listed}\n"
        line: dict = {"id": name}
        if with_image:
            write_picture(folder / "images/test" / name / "image.png", asked.image)
            line["image"] = f"{name}/image.png"
            human += "<image>"
        answer = f"The answer is {_letter(asked, options)}."
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        prompts.append(line | {"conversations": turns})
        problems[name] = {
            "question": asked.question,
            "choices": options,
            "answer": options.index(asked.answer),
            "hint": "",
            "image": "image.png" if with_image else None,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": asked.family,
            "skill": "Identify what is shown",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    write_json(folder / "llava_test_CQM-A.json", prompts)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def write_mmbench(root: Path, count: int) -> None:
    _write_mmbench(root / "mmbench/mmbench_dev_20230712.tsv", count, salt=11)


def write_mmbench_cn(root: Path, count: int) -> None:
    _write_mmbench(root / "mmbench_cn/mmbench_dev_cn_20231003.tsv", count, salt=12)


def write_seed(root: Path, count: int) -> None:
    """Every sixth question is about a frame of a video."""
    lines, questions = [], []
    for asked in draw_questions(FAMILIES, count, salt=13):
        identity, options = str(101000 + asked.number), asked.options()
        video = asked.number % 6 == 5
        kind = "video" if video else "image"
        data = f"{asked.image:07d}_{asked.number}"
        name = f"SEED-Bench-video-image/{data}.png" if video else f"SEED-Bench-image/{data}"
        write_picture(root / "seed_bench" / name, asked.image)
        text = f"{asked.question}\n{lettered(options)}\n{OPTION}"
        line = {"question_id": identity, "image": name, "text": text}
        lines.append(line | {"category": kind})
        choices = {
            f"choice_{letter.lower()}": option
            for letter, option in zip(LETTERS, options, strict=False)
        }
        questions.append(
            {
                "answer": _letter(asked, options),
                **choices,
                "data_id": f"{data}.mp4" if video else data,
                "data_type": kind,
                "question": asked.question,
                "question_id": identity,
                "question_type_id": 10 if video else SEED_TYPES[asked.family],
                "segment": [0.0, 1.0] if video else [],
            }
        )
    write_lines(root / "seed_bench/llava-seed-bench.jsonl", lines)
    write_json(
        root / "seed_bench/SEED-Bench.json",
        {"question_type": SEED_NAMES, "questions": questions},
    )


def write_mmmu(root: Path, count: int) -> None:
    """Every sixth question is an open one, as published answers to it are lists of phrases."""
    lines = []
    for asked in draw_questions(FAMILIES, count, salt=14):
        options, open_ended = asked.options(), asked.number % 6 == 5
        name = f"validation_{MMMU_SUBJECTS[asked.number % 6]}_{asked.number + 1}"
        write_picture(root / "mmmu/images" / f"{name}_1.png", asked.image)
        lines.append(
            {
                "id": name,
                "question": f"<image 1> {asked.question}",
                "options": "[]" if open_ended else str(options),
                "answer": str([asked.answer]) if open_ended else _letter(asked, options),
                "question_type": "open" if open_ended else "multiple-choice",
            }
        )
    write_lines(root / "mmmu/validation.jsonl", lines)


def _write_mmbench(path: Path, count: int, salt: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, delimiter="\t", lineterminator="\n")
        rows.writerow(MMBENCH_COLUMNS)
        for asked in draw_questions(FAMILIES, count, salt=salt):
            options = asked.options()
            image = base64.b64encode(encoded(asked.image, "JPEG")).decode()
            hint = "Every shape is drawn once or counted." if asked.number % 5 == 0 else ""
            answer = _letter(asked, options)
            head = [asked.number, asked.question, hint, *options, answer, asked.family, image]
            rows.writerow([*head, "demo", "perception", "", "dev"])


def _letter(asked: Asked, options: Sequence[str]) -> str:
    return LETTERS[options.index(asked.answer)]
