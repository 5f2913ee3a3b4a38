"""From the rows of public datasets to LLaVA's files, one function a benchmark.

Images are written first and question files last: where a question file stands, its images do.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.data.hub import Dataset, Row
from llava.eval.data.layout import Layout
from llava.eval.scorers.mme import YES_OR_NO
from llava.eval.scorers.textvqa import OCR_LINE
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import OPTION_LETTER, SHORT_ANSWER
from llava.eval.tasks.mme import RELEASE
from llava.eval.tasks.vizwiz import UNANSWERABLE

Read = Callable[[Dataset], Iterator[Row]]
Build = Callable[[Read, Sequence[Dataset], Layout], None]

MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"),
    *("l2-category", "comment", "split"),
)
SEED_TYPES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location"),
    *("Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning"),
    *("Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding"),
)


def gqa(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """Datasets: images, questions."""
    images, questions = datasets
    for row in read(images):
        layout.image(f"gqa/data/images/{row['id']}.jpg", row["image"])
    truth = {row["id"]: {key: row[key] for key in questions.columns} for row in read(questions)}
    layout.json("gqa/data/testdev_balanced_questions.json", truth)
    prompts = [
        _prompt(name, f"{row['imageId']}.jpg", row["question"] + SHORT_ANSWER)
        for name, row in truth.items()
    ]
    layout.lines("gqa/llava_gqa_testdev_balanced.jsonl", prompts)


def vqav2_val(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """VQA's own two files: LLaVA has none for this split."""
    keys = ("question_id", "image_id", "answers", "question_type", "answer_type")
    questions, annotations = [], []
    for row in read(datasets[0]):
        name = f"COCO_val2014_{int(row['image_id']):012d}.jpg"
        layout.image(f"vqav2/val2014/{name}", row["image"])
        questions.append({key: row[key] for key in ("question_id", "image_id", "question")})
        annotations.append({key: row[key] for key in keys})
    layout.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    layout.json("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})


def vqav2_test(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """Datasets: the whole test split, test-dev."""
    for dataset, name in zip(datasets, ("test2015", "test-dev2015"), strict=True):
        prompts = []
        for row in read(dataset):
            image = f"COCO_test2015_{int(row['image_id']):012d}.jpg"
            layout.image(f"vqav2/test2015/{image}", row["image"])
            prompts.append(_prompt(row["question_id"], image, row["question"] + SHORT_ANSWER))
        layout.lines(f"vqav2/llava_vqav2_mscoco_{name}.jsonl", prompts)


def textvqa(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """LLaVA takes the image's id for the question's."""
    annotations, prompts = [], []
    for row in read(datasets[0]):
        image = f"{row['image_id']}.jpg"
        layout.image(f"textvqa/train_images/{image}", row["image"])
        keys = ("image_id", "question_id", "question", "answers")
        annotations.append({key: row[key] for key in keys})
        text = f"{row['question']}\n{OCR_LINE}{', '.join(row['ocr_tokens'])}{SHORT_ANSWER}"
        prompts.append(_prompt(row["image_id"], image, text))
    layout.json("textvqa/TextVQA_0.5.1_val.json", {"data": annotations})
    layout.lines("textvqa/llava_textvqa_val_v051_ocr.jsonl", prompts)


def pope(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """Images only: the dataset's random split has 3,000 questions, LLaVA's has 2,910 of them."""
    for row in read(datasets[0]):
        layout.image(f"pope/val2014/{row['image_source']}.jpg", row["image"])


def mme(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """The release's text files too: question, tab, answer."""
    answers, prompts = defaultdict(list), []
    for row in read(datasets[0]):
        name, question = row["question_id"], row["question"].strip()
        layout.image(f"{RELEASE}/{name}", row["image"])
        answers[Path(name).with_suffix(".txt").as_posix()].append(f"{question}\t{row['answer']}\n")
        text = question.removesuffix(YES_OR_NO).rstrip() + SHORT_ANSWER
        prompts.append(_prompt(name, name, text, row["category"]))
    for file, lines in answers.items():
        layout.text(f"{RELEASE}/{file}", "".join(lines))
    layout.lines("MME/llava_mme.jsonl", prompts)


def mmbench(path: str) -> Build:
    """Builder of the TSV file at `path`, with the columns and their order as published."""

    def build(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
        lines = ["\t".join(MMBENCH_COLUMNS)]
        for row in read(datasets[0]):
            row |= {"image": _as_base64(row["image"]), "l2-category": row.get("L2-category")}
            lines.append("\t".join(_tsv_cell(row.get(key)) for key in MMBENCH_COLUMNS))
        layout.text(path, "\n".join(lines) + "\n")

    return build


def seed(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    """Of a video the middle one of its frames."""
    truth, prompts = [], []
    for row in read(datasets[0]):
        about_video = row["data_type"] == "video"
        image = f"SEED-Bench-image/{row['data_id']}"
        if about_video:
            image = f"SEED-Bench-video-image/{row['question_id']}.png"
        frames = row["image"]
        layout.image(f"seed_bench/{image}", frames[len(frames) // 2] if frames else None)
        keys = ("question_id", "question_type_id", "data_type", "answer", "question")
        truth.append({key: row[key] for key in keys})
        options = [f"{letter}. {row[f'choice_{letter.lower()}']}" for letter in "ABCD"]
        text = "\n".join([row["question"], *options]) + OPTION_LETTER
        prompts.append(_prompt(row["question_id"], image, text, row["data_type"]))
    types = {name: number for number, name in enumerate(SEED_TYPES, start=1)}
    layout.json("seed_bench/SEED-Bench.json", {"questions": truth, "question_type": types})
    layout.lines("seed_bench/llava-seed-bench.jsonl", prompts)


def mmmu(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    rows = []
    for row in read(datasets[0]):
        for number in range(1, 8):
            if row[f"image_{number}"] is not None:
                layout.image(f"mmmu/images/{row['id']}_{number}.png", row[f"image_{number}"])
        keys = ("id", "question", "options", "answer", "question_type")
        rows.append({key: row[key] for key in keys})
    layout.lines("mmmu/validation.jsonl", rows)


def vizwiz(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    prompts = []
    for row in read(datasets[0]):
        name = row["question_id"]
        layout.image(f"vizwiz/test/{name}", row["image"])
        prompts.append(_prompt(name, name, row["question"] + UNANSWERABLE + SHORT_ANSWER))
    layout.lines("vizwiz/llava_test.jsonl", prompts)


def mmvet(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    prompts = []
    for row in read(datasets[0]):
        image, number = f"{row['question_id']}.png", row["question_id"].removeprefix("v1_")
        layout.image(f"mm-vet/images/{image}", row["image"])
        prompts.append(_prompt(int(number), image, row["question"]))
    layout.lines("mm-vet/llava-mm-vet.jsonl", prompts)


def llava_bench(read: Read, datasets: Sequence[Dataset], layout: Layout) -> None:
    folder, prompts = "llava-bench-in-the-wild", []
    for row in read(datasets[0]):
        image = Path(str(row["image_id"])).stem + ".jpg"
        layout.image(f"{folder}/images/{image}", row["image"])
        prompts.append(_prompt(row["question_id"], image, row["question"], row["category"]))
    layout.lines(f"{folder}/questions.jsonl", prompts)


def _prompt(name: str | int, image: str, text: str, category: str = "default") -> Row:
    """A line of LLaVA's question files."""
    return {"question_id": name, "image": image, "text": text, "category": category}


def _as_base64(cell: Mapping[str, Any] | None) -> str:
    if not isinstance(cell, Mapping) or not cell.get("bytes"):
        raise TaskError("a row of the dataset holds no image; download it again")
    return base64.b64encode(cell["bytes"]).decode("ascii")


def _tsv_cell(value: Any) -> str:
    """A cell as the published tables have it: nothing for null, quotes where they are needed."""
    text = "" if value is None else str(value)
    if any(mark in text for mark in '\t\n\r"'):
        return '"' + text.replace('"', '""') + '"'
    return text
