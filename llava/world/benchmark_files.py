"""Demo files of the benchmarks that are answered in a word or a phrase."""

from __future__ import annotations

from pathlib import Path

from llava.eval.demo.files import SHORT, write_json, write_lines, write_picture
from llava.eval.demo.source import Asked, draw_existence, draw_questions
from llava.world.splits import scene

GQA_TYPES = {"existence": "verify", "color": "query", "relation": "query", "position": "query"}
MME_SPLIT_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_CATEGORIES = (
    *("existence", "count", "position", "color", "OCR"),
    *MME_SPLIT_FOLDERS,
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
MME_FAMILIES = {"count": "count", "position": "position", "color": "color", "OCR": "text"}
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."


def write_gqa(root: Path, count: int) -> None:
    lines, questions = [], {}
    for asked in draw_questions(tuple(GQA_TYPES), count):
        identity, image = f"20{asked.number:07d}", f"n{asked.image:06d}"
        write_picture(root / "gqa/data/images" / f"{image}.jpg", asked.image)
        lines.append(
            {
                "question_id": identity,
                "image": f"{image}.jpg",
                "text": f"{asked.question}\n{SHORT}",
                "category": "default",
            }
        )
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
    drawn = draw_questions(("color", "count", "existence"), count)
    lines = []
    for asked in drawn:
        for folder in ("val2014", "test2015"):
            name = f"COCO_{folder}_{asked.image:012d}.jpg"
            write_picture(root / "vqav2" / folder / name, asked.image)
        text = f"{asked.question}\n{SHORT}"
        lines.append({"question_id": _vqa_id(asked), "image": name, "text": text})
    write_lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", lines)
    write_lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", lines)
    questions = [
        {"image_id": asked.image, "question": asked.question, "question_id": _vqa_id(asked)}
        for asked in drawn
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write_json(
        root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        head | {"task_type": "Open-Ended", "questions": questions},
    )
    annotations = [
        {
            "question_type": asked.question.split()[0].lower(),
            "multiple_choice_answer": asked.answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number, answer in enumerate(ten_answers(asked))
            ],
            "image_id": asked.image,
            "answer_type": _answer_type(asked),
            "question_id": _vqa_id(asked),
        }
        for asked in drawn
    ]
    write_json(
        root / "vqav2/v2_mscoco_val2014_annotations.json", head | {"annotations": annotations}
    )


def write_textvqa(root: Path, count: int) -> None:
    lines, data = [], []
    for asked in draw_questions(("text",), count, salt=1):
        name = f"{asked.image:016x}"
        write_picture(root / "textvqa/train_images" / f"{name}.jpg", asked.image)
        tokens = [sign.text for sign in scene(f"test/{asked.image:06d}").signs]
        reading = f"Reference OCR token: {', '.join(tokens)}"
        lines.append(
            {
                "question_id": name,
                "image": f"{name}.jpg",
                "text": f"{asked.question}\n{reading}\n{SHORT}",
            }
        )
        data.append(
            {
                "question": asked.question,
                "image_id": name,
                "image_classes": ["Sign"],
                "image_width": 336,
                "image_height": 336,
                "answers": ten_answers(asked),
                "question_tokens": asked.question.lower().strip("?").split(),
                "question_id": 34602 + asked.number,
                "set_name": "val",
            }
        )
    write_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", head | {"data": data})


def write_pope(root: Path, count: int) -> None:
    lines = []
    for salt, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for asked in draw_existence(-(-count // 3), salt):
            name = f"COCO_val2014_{asked.image:012d}.jpg"
            write_picture(root / "pope/val2014" / name, asked.image)
            lines.append(
                {
                    "question_id": len(lines),
                    "image": name,
                    "text": f"{asked.question}\n{SHORT}",
                    "category": category,
                }
            )
            line = {"question_id": asked.number + 1, "image": name, "text": asked.question}
            labels.append(line | {"label": asked.answer})
        write_lines(root / f"pope/coco/coco_pope_{category}.json", labels)
    write_lines(root / "pope/llava_pope_test.jsonl", lines)


def write_mme(root: Path, count: int) -> None:
    """Two questions about each image, one with the answer yes and one with no, per category."""
    base = root / "MME/MME_Benchmark_release_version"
    images = max(1, count // (2 * len(MME_CATEGORIES)))
    lines = []
    for place, category in enumerate(MME_CATEGORIES):
        split = category in MME_SPLIT_FOLDERS
        family = MME_FAMILIES.get(category, "color")
        for asked in draw_questions((family,), 2 * images, first_image=place * images, salt=2)[::2]:
            folder = f"{category}/images" if split else category
            texts = f"{category}/questions_answers_YN" if split else category
            name = f"{asked.image:06d}"
            write_picture(base / folder / f"{name}.jpg", asked.image)
            wrong = next(option for option in asked.options() if option != asked.answer)
            pairs = [
                (f"{asked.question} Is it {value}?", truth)
                for value, truth in ((asked.answer, "Yes"), (wrong, "No"))
            ]
            ground = "".join(f"{text} Please answer yes or no.\t{truth}\n" for text, truth in pairs)
            (base / texts).mkdir(parents=True, exist_ok=True)
            (base / texts / f"{name}.txt").write_text(ground, encoding="utf-8")
            lines += [
                {
                    "question_id": f"{category}/{name}.jpg",
                    "image": f"{folder}/{name}.jpg",
                    "text": f"{text}\n{SHORT}",
                    "category": category,
                }
                for text, _ in pairs
            ]
    write_lines(root / "MME/llava_mme.jsonl", lines)


def write_vizwiz(root: Path, count: int) -> None:
    lines, test = [], []
    for asked in draw_questions(("color", "text"), count, salt=3):
        name = f"VizWiz_test_{asked.number:08d}.jpg"
        write_picture(root / "vizwiz/test" / name, asked.image)
        text = f"{asked.question}\n{UNSURE}\n{SHORT}"
        lines.append({"question_id": asked.number, "image": name, "text": text})
        test.append({"image": name, "question": asked.question})
    write_lines(root / "vizwiz/llava_test.jsonl", lines)
    write_json(root / "vizwiz/test.json", test)


def write_mmvet(root: Path, count: int) -> None:
    lines = []
    for asked in draw_questions(("color", "position"), count, salt=4):
        name = f"v1_{asked.number}.png"
        write_picture(root / "mm-vet/images" / name, asked.image)
        lines.append({"question_id": asked.number, "image": name, "text": asked.question})
    write_lines(root / "mm-vet/llava-mm-vet.jsonl", lines)


def write_llava_bench(root: Path, count: int) -> None:
    folder = root / "llava-bench-in-the-wild"
    lines = []
    for asked in draw_questions(("color", "position", "count"), count, salt=5):
        name = f"{asked.image + 1:03d}.jpg"
        write_picture(folder / "images" / name, asked.image)
        kind = ("conv", "detail", "complex")[asked.number % 3]
        line = {"question_id": asked.number, "image": name, "text": asked.question}
        lines.append(line | {"category": kind})
    write_lines(folder / "questions.jsonl", lines)


def ten_answers(asked: Asked) -> list[str]:
    """What ten people said: eight agree, two name something else."""
    wrong = [option for option in asked.options() if option != asked.answer] or ["unanswerable"]
    return [asked.answer] * 8 + [wrong[0], wrong[-1]]


def _vqa_id(asked: Asked) -> int:
    return 1000 * (asked.image + 1) + asked.number


def _answer_type(asked: Asked) -> str:
    return {"existence": "yes/no", "count": "number"}.get(asked.family, "other")
