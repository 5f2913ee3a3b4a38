"""Question and annotation files of benchmarks, in their published formats, about drawn scenes.

Every file has the name, keys and prompts that LLaVA's data layout has; questions and pictures come
from `llava.world`. They let each benchmark run where its data are not, in `paper-table --demo` and
in tests. What comes out says that the code works, and nothing about any benchmark.
"""

import base64
import csv
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from llava.world.questions import LETTERS, Asked, draw_existence, draw_questions
from llava.world.splits import render, scene

SHORT = "Answer the question using a single word or phrase."
OPTION = "Answer with the option's letter from the given choices directly."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."

CHOICE_FAMILIES = ("color", "relation", "position", "count")
GQA_TYPES = {"existence": "verify", "color": "query", "relation": "query", "position": "query"}
VQA_TYPES = {"existence": "yes/no", "count": "number"}
MME_SPLIT_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_CATEGORIES = (
    *("existence", "count", "position", "color", "OCR"),
    *MME_SPLIT_FOLDERS,
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
MME_FAMILIES = {"count": "count", "position": "position", "color": "color", "OCR": "text"}
SEED_TYPES = {"color": 4, "relation": 6, "position": 3, "count": 5}
SEED_NAMES = (
    *("Scene Understanding", "Instance Identity", "Instance Location", "Instance Attributes"),
    *("Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning"),
    *("Text Understanding", "Action Recognition", "Action Prediction"),
    "Procedure Understanding",
)
MMMU_SUBJECTS = ("Art", "Accounting", "Biology", "Pharmacy", "History", "Electronics")
MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
)


def write_gqa(root: Path, count: int) -> None:
    lines, questions = [], {}
    for asked in draw_questions(tuple(GQA_TYPES), count):
        identity, image = f"20{asked.number:07d}", f"n{asked.image:06d}"
        write_picture(root / "gqa/data/images" / f"{image}.jpg", asked.image)
        lines.append(_line(identity, f"{image}.jpg", asked.question, SHORT, category="default"))
        structural = GQA_TYPES[asked.family]
        questions[identity] = {
            "semantic": [],
            "entailed": [identity],
            "equivalent": [identity],
            "question": asked.question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": None},
            "answer": asked.answer,
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": asked.family, "semantic": "attr", "structural": structural},
            "fullAnswer": f"{asked.answer.capitalize()}.",
        }
    write_lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", lines)
    write_json(root / "gqa/data/testdev_balanced_questions.json", questions)


def write_vqav2(root: Path, count: int) -> None:
    lines, questions, annotations = [], [], []
    for asked in draw_questions(("color", "count", "existence"), count):
        for folder in ("val2014", "test2015"):
            name = f"COCO_{folder}_{asked.image:012d}.jpg"
            write_picture(root / "vqav2" / folder / name, asked.image)
        identity = 1000 * (asked.image + 1) + asked.number
        lines.append(_line(identity, name, asked.question, SHORT))
        questions.append(
            {"image_id": asked.image, "question": asked.question, "question_id": identity}
        )
        annotations.append(
            {
                "question_type": asked.question.split()[0].lower(),
                "multiple_choice_answer": asked.answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                    for number, answer in enumerate(_ten_answers(asked), start=1)
                ],
                "image_id": asked.image,
                "answer_type": VQA_TYPES.get(asked.family, "other"),
                "question_id": identity,
            }
        )
    for split in ("test-dev2015", "test2015"):
        write_lines(root / f"vqav2/llava_vqav2_mscoco_{split}.jsonl", lines)
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write_json(
        root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        head | {"task_type": "Open-Ended", "questions": questions},
    )
    write_json(
        root / "vqav2/v2_mscoco_val2014_annotations.json", head | {"annotations": annotations}
    )


def write_textvqa(root: Path, count: int) -> None:
    lines, data = [], []
    for asked in draw_questions(("text",), count, salt=1):
        name = f"{asked.image:016x}"
        write_picture(root / "textvqa/train_images" / f"{name}.jpg", asked.image)
        tokens = ", ".join(sign.text for sign in scene(asked.scene).signs)
        reading = f"Reference OCR token: {tokens}"
        lines.append(_line(name, f"{name}.jpg", asked.question, reading, SHORT))
        data.append(
            {
                "question": asked.question,
                "image_id": name,
                "image_classes": ["Sign"],
                "image_width": 336,
                "image_height": 336,
                "answers": _ten_answers(asked),
                "question_tokens": asked.question.lower().strip("?").split(),
                "question_id": 34602 + asked.number,
                "set_name": "val",
            }
        )
    write_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", head | {"data": data})


def write_pope(root: Path, count: int) -> None:
    lines: list[dict] = []
    for salt, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for asked in draw_existence(-(-count // 3), salt):
            name = f"COCO_val2014_{asked.image:012d}.jpg"
            write_picture(root / "pope/val2014" / name, asked.image)
            lines.append(_line(len(lines), name, asked.question, SHORT, category=category))
            labels.append(_line(asked.number + 1, name, asked.question, label=asked.answer))
        write_lines(root / f"pope/coco/coco_pope_{category}.json", labels)
    write_lines(root / "pope/llava_pope_test.jsonl", lines)


def write_mme(root: Path, count: int) -> None:
    """Two questions about each image, one with the answer yes and one with no, per category."""
    base = root / "MME/MME_Benchmark_release_version"
    images = max(1, count // (2 * len(MME_CATEGORIES)))
    lines = []
    for place, category in enumerate(MME_CATEGORIES):
        split = category in MME_SPLIT_FOLDERS
        folder = f"{category}/images" if split else category
        texts = base / (f"{category}/questions_answers_YN" if split else category)
        family = MME_FAMILIES.get(category, "color")
        for asked in draw_questions((family,), 2 * images, first_image=place * images, salt=2)[::2]:
            name = f"{asked.image:06d}"
            write_picture(base / folder / f"{name}.jpg", asked.image)
            wrong = next(option for option in asked.options() if option != asked.answer)
            truths = {
                f"{asked.question} Is it {asked.answer}?": "Yes",
                f"{asked.question} Is it {wrong}?": "No",
            }
            ground = (
                f"{text} Please answer yes or no.\t{truth}\n" for text, truth in truths.items()
            )
            write_text(texts / f"{name}.txt", "".join(ground))
            key, image = f"{category}/{name}.jpg", f"{folder}/{name}.jpg"
            lines += [_line(key, image, text, SHORT, category=category) for text in truths]
    write_lines(root / "MME/llava_mme.jsonl", lines)


def write_vizwiz(root: Path, count: int) -> None:
    lines, test = [], []
    for asked in draw_questions(("color", "text"), count, salt=3):
        name = f"VizWiz_test_{asked.number:08d}.jpg"
        write_picture(root / "vizwiz/test" / name, asked.image)
        lines.append(_line(asked.number, name, asked.question, UNSURE, SHORT))
        test.append({"image": name, "question": asked.question})
    write_lines(root / "vizwiz/llava_test.jsonl", lines)
    write_json(root / "vizwiz/test.json", test)


def write_mmvet(root: Path, count: int) -> None:
    lines = []
    for asked in draw_questions(("color", "position"), count, salt=4):
        name = f"v1_{asked.number}.png"
        write_picture(root / "mm-vet/images" / name, asked.image)
        lines.append(_line(asked.number, name, asked.question))
    write_lines(root / "mm-vet/llava-mm-vet.jsonl", lines)


def write_llava_bench(root: Path, count: int) -> None:
    folder, lines = root / "llava-bench-in-the-wild", []
    for asked in draw_questions(("color", "position", "count"), count, salt=5):
        name = f"{asked.image + 1:03d}.jpg"
        write_picture(folder / "images" / name, asked.image)
        kind = ("conv", "detail", "complex")[asked.number % 3]
        lines.append(_line(asked.number, name, asked.question, category=kind))
    write_lines(folder / "questions.jsonl", lines)


def write_scienceqa(root: Path, count: int) -> None:
    """Every fourth question has no image, as in the published test split."""
    folder, prompts, problems = root / "scienceqa", [], {}
    for asked in draw_questions(CHOICE_FAMILIES, count, salt=10):
        name, options = str(asked.number + 1), asked.options()
        with_image = asked.number % 4 != 3
        listed = " ".join(
            f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)
        )
        human = f"Context: N/A\nQuestion: {asked.question}\nOptions: {listed}\n"
        prompt: dict[str, Any] = {"id": name}
        if with_image:
            write_picture(folder / "images/test" / name / "image.png", asked.image)
            prompt["image"] = f"{name}/image.png"
            human += "<image>"
        answer = f"The answer is {asked.letter()}."
        prompt["conversations"] = [
            {"from": "human", "value": human},
            {"from": "gpt", "value": answer},
        ]
        prompts.append(prompt)
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


def _write_mmbench(path: Path, count: int, salt: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, delimiter="\t", lineterminator="\n")
        rows.writerow(MMBENCH_COLUMNS)
        for asked in draw_questions(CHOICE_FAMILIES, count, salt=salt):
            image = base64.b64encode(encoded(asked.image, "JPEG")).decode()
            hint = "Every shape is drawn once or counted." if asked.number % 5 == 0 else ""
            head = [asked.number, asked.question, hint, *asked.options(), asked.letter()]
            rows.writerow([*head, asked.family, image, "demo", "perception", "", "dev"])


def write_seed(root: Path, count: int) -> None:
    """Every sixth question is about a frame of a video."""
    folder, lines, questions = root / "seed_bench", [], []
    for asked in draw_questions(CHOICE_FAMILIES, count, salt=13):
        identity, options = str(101000 + asked.number), asked.options()
        video = asked.number % 6 == 5
        kind = "video" if video else "image"
        data = f"{asked.image:07d}_{asked.number}"
        name = f"SEED-Bench-video-image/{data}.png" if video else f"SEED-Bench-image/{data}"
        write_picture(folder / name, asked.image)
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
        lines.append(_line(identity, name, asked.question, *lettered, OPTION, category=kind))
        choices = zip(("choice_a", "choice_b", "choice_c", "choice_d"), options, strict=False)
        questions.append(
            {
                "answer": asked.letter(),
                **dict(choices),
                "data_id": f"{data}.mp4" if video else data,
                "data_type": kind,
                "question": asked.question,
                "question_id": identity,
                "question_type_id": 10 if video else SEED_TYPES[asked.family],
                "segment": [0.0, 1.0] if video else [],
            }
        )
    types = {name: number for number, name in enumerate(SEED_NAMES, start=1)}
    write_lines(folder / "llava-seed-bench.jsonl", lines)
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": questions})


def write_mmmu(root: Path, count: int) -> None:
    """Every sixth question is an open one, as published answers to it are lists of phrases."""
    lines = []
    for asked in draw_questions(CHOICE_FAMILIES, count, salt=14):
        open_ended = asked.number % 6 == 5
        name = f"validation_{MMMU_SUBJECTS[asked.number % 6]}_{asked.number + 1}"
        write_picture(root / "mmmu/images" / f"{name}_1.png", asked.image)
        lines.append(
            {
                "id": name,
                "question": f"<image 1> {asked.question}",
                "options": "[]" if open_ended else str(asked.options()),
                "answer": str([asked.answer]) if open_ended else asked.letter(),
                "question_type": "open" if open_ended else "multiple-choice",
            }
        )
    write_lines(root / "mmmu/validation.jsonl", lines)


# {benchmark: what writes about `count` questions of it into a data root}
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "gqa": write_gqa,
    "vqav2": write_vqav2,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "scienceqa": write_scienceqa,
    "mmbench": write_mmbench,
    "mmbench-cn": write_mmbench_cn,
    "seed": write_seed,
    "mmmu": write_mmmu,
    "vizwiz": write_vizwiz,
    "mmvet": write_mmvet,
    "llava-bench": write_llava_bench,
}


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_picture(path: Path, number: int) -> None:
    """Write test scene `number` as a JPEG, or a PNG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(encoded(number, "PNG" if path.suffix == ".png" else "JPEG"))


@lru_cache(maxsize=256)
def encoded(number: int, kind: str) -> bytes:
    """Return the bytes of an image file of test scene `number`, RGB, 336 x 336."""
    buffer = BytesIO()
    render(f"test/{number:06d}").save(buffer, kind, quality=95)
    return buffer.getvalue()


def _line(identity: str | int, image: str, *text: str, **more: str) -> dict[str, Any]:
    """Return a line of LLaVA's question files; `text` are its lines."""
    return {"question_id": identity, "image": image, "text": "\n".join(text), **more}


def _ten_answers(asked: Asked) -> list[str]:
    """Return what ten people said: eight agree, two name something else."""
    wrong = [option for option in asked.options() if option != asked.answer] or ["unanswerable"]
    return [asked.answer] * 8 + [wrong[0], wrong[-1]]
