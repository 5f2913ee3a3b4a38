"""Tiny files in the published formats of the short-answer benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_images(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / name)


def write_gqa(root: Path) -> None:
    def question(answer: str, structural: str, image: str, balanced: bool) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "attr", "detailed": "x"}
        return {"isBalanced": balanced, "answer": answer, "imageId": image, "types": types}

    questions = {
        "10": question("yes", "verify", "n1", True),
        "11": question("cat", "query", "n1", True),
        "12": question("red", "query", "n2", True),
        "13": question("no", "logical", "n2", False),
    }
    rows = [
        {"question_id": name, "image": f"{row['imageId']}.jpg", "text": f"Q{name}?{SHORT}"}
        for name, row in questions.items()
    ]
    write_json(root / "gqa/data/testdev_balanced_questions.json", questions)
    write_lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)
    write_images(root / "gqa/data/images", ["n1.jpg", "n2.jpg"])


def write_vqav2(root: Path) -> None:
    answers = {1001: ["2"] * 6 + ["two"] * 4, 1002: ["yes"] * 10, 2001: ["red"] * 2 + ["blue"] * 8}
    questions = [
        {"question_id": name, "image_id": name // 1000, "question": f"Q{name}?"} for name in answers
    ]
    annotations = [
        {"question_id": name, "answers": [{"answer": text} for text in texts]}
        for name, texts in answers.items()
    ]
    folder = root / "vqav2"
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    names = [f"COCO_val2014_{image:012d}.jpg" for image in (1, 2)]
    write_images(folder / "val2014", names)
    rows = [{"question_id": name, "image": "t.jpg", "text": "Q?" + SHORT} for name in (5, 6, 7)]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:])
    write_images(folder / "test2015", ["t.jpg"])


def write_textvqa(root: Path) -> None:
    rows = [
        {
            "question_id": image,
            "image": f"{image}.jpg",
            "text": f"What {word}?\nReference OCR token: A, B{SHORT}",
        }
        for image, word in (("a", "brand"), ("a", "year"), ("b", "brand"))
    ]
    data = [
        {"image_id": image, "question": f"what {word}?", "answers": [answer] * 10}
        for image, word, answer in (
            *(("a", "brand", "Acme"), ("a", "year", "1,000")),
            *(("b", "brand", "the sign"), ("b", "year", "unused")),
        )
    ]
    write_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    write_images(root / "textvqa/train_images", ["a.jpg", "b.jpg"])


def write_pope(root: Path) -> None:
    labels = {"random": "yyn", "popular": "yn", "adversarial": "ny"}
    words = {"y": "yes", "n": "no"}
    rows: list[dict[str, Any]] = []
    for split, letters in labels.items():
        given = [
            {
                "question_id": place + 1,
                "image": f"{place}.jpg",
                "text": "Q?",
                "label": words[letter],
            }
            for place, letter in enumerate(letters)
        ]
        write_lines(root / f"pope/coco/coco_pope_{split}.json", given)
        rows += [
            {
                "question_id": len(rows) + row["question_id"] - 1,
                "image": row["image"],
                "text": "Is there a cat in the image?" + SHORT,
                "category": split,
            }
            for row in given
        ]
    write_lines(root / "pope/llava_pope_test.jsonl", rows)
    write_images(root / "pope/val2014", ["0.jpg", "1.jpg", "2.jpg"])


def write_vizwiz(root: Path) -> None:
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    rows = [
        {"question_id": name, "image": f"{name}.jpg", "text": f"Q{name}?\n{unanswerable}{SHORT}"}
        for name in (0, 1)
    ]
    write_lines(root / "vizwiz/llava_test.jsonl", rows)
    write_images(root / "vizwiz/test", ["0.jpg", "1.jpg"])


def write_mme(root: Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    rows = []
    for category, images, texts, spaces in (
        ("artwork", "images/", "questions_answers_YN/", " "),
        ("code_reasoning", "", "", "  "),
    ):
        for name in ("1", "2"):
            lines = [f"{word}?{spaces}Please answer yes or no." for word in ("Good", "Bad")]
            path = release / category / f"{texts}{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{lines[0]}\tYes\n{lines[1]}\tNo\n")
            picture = f"{category}/{images}{name}.png"
            write_images(release, [picture])
            rows += [
                {
                    "question_id": f"{category}/{name}.png",
                    "image": picture,
                    "text": f"{word}?{SHORT}",
                    "category": category,
                }
                for word in ("Good", "Bad")
            ]
    write_lines(root / "MME/llava_mme.jsonl", rows)


WRITERS = {
    "gqa": write_gqa,
    "vqav2": write_vqav2,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "vizwiz": write_vizwiz,
    "mme": write_mme,
}
