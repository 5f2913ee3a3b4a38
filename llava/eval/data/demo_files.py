"""Files of benchmarks about drawn scenes, for `paper-table --demo` and for tests.

A benchmark's own `build` makes them, as `prepare` does, from rows as its public dataset has them.
What no `build` makes is written here, in the published format. Questions and pictures come from
`llava.world`: what comes out says that the code works, and nothing about any benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

from llava.eval.data.layout import Layout, Read
from llava.eval.tasks import gqa, mme
from llava.eval.tasks.base import get_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, Row
from llava.eval.tasks.pope import SPLITS
from llava.eval.tasks.published import question_line
from llava.world.questions import LETTERS, Asked, draw_existence, draw_questions
from llava.world.splits import render, scene

CHOICE_FAMILIES = ("color", "relation", "position", "count")
GQA_TYPES = {"existence": "verify", "color": "query", "relation": "query", "position": "query"}
VQA_TYPES = {"existence": "yes/no", "count": "number"}
MME_SPLIT_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_CATEGORIES = (
    "existence",
    "count",
    "position",
    "color",
    "OCR",
    *MME_SPLIT_FOLDERS,
    *mme.COGNITION,
)
MME_FAMILIES = {"count": "count", "position": "position", "color": "color", "OCR": "text"}
SEED_TYPES = {"color": 3, "relation": 6, "position": 4, "count": 5}
MMMU_SUBJECTS = ("Art", "Accounting", "Biology", "Pharmacy", "History", "Electronics")


def write_gqa(root: Path, count: int) -> None:
    images: list[Row] = []
    questions: list[Row] = []
    for asked in draw_questions(tuple(GQA_TYPES), count):
        name, structural = f"n{asked.image:06d}", GQA_TYPES[asked.family]
        images.append({"id": name, "image": cell(asked.image)})
        questions.append(
            {
                "id": f"20{asked.number:07d}",
                "imageId": name,
                "question": asked.question,
                "answer": asked.answer,
                "isBalanced": True,
                "types": {"detailed": asked.family, "semantic": "attr", "structural": structural},
            }
        )
    rows = {gqa.IMAGES: images, gqa.QUESTIONS: questions}
    build("gqa", root, lambda dataset: iter(rows[dataset]))


def vqav2_row(asked: Asked) -> Row:
    answers = enumerate(ten_answers(asked), start=1)
    return {
        "question_id": 1000 * (asked.image + 1) + asked.number,
        "image_id": asked.image,
        "question_type": asked.question.split()[0].lower(),
        "answer_type": VQA_TYPES.get(asked.family, "other"),
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in answers
        ],
    }


def textvqa_row(asked: Asked) -> Row:
    return {
        "image_id": f"{asked.image:016x}",
        "question_id": 34602 + asked.number,
        "answers": ten_answers(asked),
        "ocr_tokens": [sign.text for sign in scene(asked.scene).signs],
    }


def mmbench_row(asked: Asked) -> Row:
    return {
        "index": asked.number,
        "hint": "Every shape is drawn once or counted." if asked.number % 5 == 0 else None,
        **dict(zip(LETTERS, asked.options(), strict=True)),
        "answer": asked.letter(),
        "category": asked.family,
        "source": "demo",
        "L2-category": "perception",
        "split": "dev",
    }


def seed_row(asked: Asked) -> Row:
    """Every sixth question is about a frame of a video."""
    video = asked.number % 6 == 5
    choices = zip(("choice_a", "choice_b", "choice_c", "choice_d"), asked.options(), strict=True)
    return {
        "question_id": str(101000 + asked.number),
        "question_type_id": 10 if video else SEED_TYPES[asked.family],
        "data_type": "video" if video else "image",
        "data_id": f"{asked.image:07d}_{asked.number}",
        "answer": asked.letter(),
        "image": [cell(asked.image)],
        **dict(choices),
    }


def mmmu_row(asked: Asked) -> Row:
    """Every sixth question is an open one, as published answers to it are lists of phrases."""
    open_ended = asked.number % 6 == 5
    return {
        "id": f"validation_{MMMU_SUBJECTS[asked.number % 6]}_{asked.number + 1}",
        "question": f"<image 1> {asked.question}",
        "options": "[]" if open_ended else str(asked.options()),
        "answer": str([asked.answer]) if open_ended else asked.letter(),
        "question_type": "open" if open_ended else "multiple-choice",
        "image_1": cell(asked.image, "PNG"),
        **{f"image_{number}": None for number in range(2, 8)},
    }


def vizwiz_row(asked: Asked) -> Row:
    return {"question_id": f"VizWiz_test_{asked.number:08d}.jpg"}


def mmvet_row(asked: Asked) -> Row:
    return {"question_id": f"v1_{asked.number}", "image": cell(asked.image, "PNG")}


def llava_bench_row(asked: Asked) -> Row:
    return {
        "question_id": asked.number,
        "image_id": f"{asked.image + 1:03d}.jpg",
        "category": ("conv", "detail", "complex")[asked.number % 3],
    }


def write_pope(root: Path, count: int) -> None:
    layout = Layout(root)
    lines: list[Row] = []
    for salt, split in enumerate(SPLITS):
        labels = []
        for asked in draw_existence(-(-count // 3), salt):
            name = f"COCO_val2014_{asked.image:012d}.jpg"
            layout.image(root / "pope/val2014" / name, cell(asked.image))
            lines.append(question_line(len(lines), name, asked.question + SHORT_ANSWER, split))
            label = {"question_id": asked.number + 1, "image": name, "text": asked.question}
            labels.append(label | {"label": asked.answer})
        layout.lines(root / f"pope/coco/coco_pope_{split}.json", labels)
    layout.lines(root / "pope/llava_pope_test.jsonl", lines)


def write_mme(root: Path, count: int) -> None:
    """Two questions about each image, one with the answer yes and one with no, per category."""
    layout, base, lines = Layout(root), root / mme.RELEASE, []
    images = max(1, count // (2 * len(MME_CATEGORIES)))
    for place, category in enumerate(MME_CATEGORIES):
        split = category in MME_SPLIT_FOLDERS
        folder = f"{category}/images" if split else category
        texts = base / (f"{category}/questions_answers_YN" if split else category)
        family = MME_FAMILIES.get(category, "color")
        for asked in draw_questions((family,), 2 * images, first_image=place * images, salt=2)[::2]:
            name = f"{asked.image:06d}"
            image, key = f"{folder}/{name}.jpg", f"{category}/{name}.jpg"
            layout.image(base / image, cell(asked.image))
            wrong = next(option for option in asked.options() if option != asked.answer)
            truths = []
            for said, truth in ((asked.answer, "Yes"), (wrong, "No")):
                text = f"{asked.question} Is it {said}?"
                truths.append(f"{text} {mme.YES_OR_NO}\t{truth}\n")
                lines.append(question_line(key, image, text + SHORT_ANSWER, category))
            layout.write(texts / f"{name}.txt", "".join(truths))
    layout.lines(root / "MME/llava_mme.jsonl", lines)


def write_scienceqa(root: Path, count: int) -> None:
    """Every fourth question has no image, as in the published test split."""
    layout, folder, prompts, problems = Layout(root), root / "scienceqa", [], {}
    for asked in draw_questions(CHOICE_FAMILIES, count, salt=10):
        name, options = str(asked.number + 1), asked.options()
        with_image = asked.number % 4 != 3
        listed = " ".join(map("({}) {}".format, LETTERS, options))
        human = f"Context: N/A\nQuestion: {asked.question}\nOptions: {listed}\n"
        prompt: Row = {"id": name}
        if with_image:
            layout.image(folder / "images/test" / name / "image.png", cell(asked.image, "PNG"))
            prompt["image"] = f"{name}/image.png"
            human += "<image>"
        prompt["conversations"] = [
            {"from": "human", "value": human},
            {"from": "gpt", "value": f"The answer is {asked.letter()}."},
        ]
        prompts.append(prompt)
        problems[name] = {
            "question": asked.question,
            "choices": options,
            "answer": options.index(asked.answer),
            "image": "image.png" if with_image else None,
            "category": asked.family,
            "split": "test",
        }
    layout.json(folder / "llava_test_CQM-A.json", prompts)
    layout.json(folder / "problems.json", problems)
    layout.json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def write_rows(
    task: str,
    families: Sequence[str],
    salt: int,
    row: Callable[[Asked], Row],
    root: Path,
    count: int,
) -> None:
    """Build a benchmark from `count` rows: question, answer and image, and what `row` gives."""
    rows = [
        {"question": asked.question, "answer": asked.answer, "image": cell(asked.image)}
        | row(asked)
        for asked in draw_questions(families, count, salt=salt)
    ]
    build(task, root, lambda _: map(dict, rows))


def build(task: str, root: Path, read: Read) -> None:
    """Make the files of every protocol of a benchmark from the rows that `read` yields."""
    for protocol in get_benchmark(task).protocols:
        sources = get_benchmark(task)(root, protocol).sources()
        assert sources is not None and sources.build is not None
        sources.build(read, Layout(root))


# {benchmark: what writes about `count` questions of it into a data root}
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "gqa": write_gqa,
    "vqav2": partial(write_rows, "vqav2", ("color", "count", "existence"), 0, vqav2_row),
    "textvqa": partial(write_rows, "textvqa", ("text",), 1, textvqa_row),
    "pope": write_pope,
    "mme": write_mme,
    "scienceqa": write_scienceqa,
    "mmbench": partial(write_rows, "mmbench", CHOICE_FAMILIES, 11, mmbench_row),
    "mmbench-cn": partial(write_rows, "mmbench-cn", CHOICE_FAMILIES, 12, mmbench_row),
    "seed": partial(write_rows, "seed", CHOICE_FAMILIES, 13, seed_row),
    "mmmu": partial(write_rows, "mmmu", CHOICE_FAMILIES, 14, mmmu_row),
    "vizwiz": partial(write_rows, "vizwiz", ("color", "text"), 3, vizwiz_row),
    "mmvet": partial(write_rows, "mmvet", ("color", "position"), 4, mmvet_row),
    "llava-bench": partial(
        write_rows, "llava-bench", ("color", "position", "count"), 5, llava_bench_row
    ),
}


@lru_cache(maxsize=256)
def cell(number: int, kind: str = "JPEG") -> Mapping[str, Any]:
    """Return test scene `number` as an image cell of a dataset: RGB, 336 x 336."""
    buffer = BytesIO()
    render(f"test/{number:06d}").save(buffer, kind, quality=95)
    return {"bytes": buffer.getvalue(), "path": None}


def ten_answers(asked: Asked) -> list[str]:
    """Return what ten people said: eight agree, two name something else."""
    wrong = [option for option in asked.options() if option != asked.answer] or ["unanswerable"]
    return [asked.answer] * 8 + [wrong[0], wrong[-1]]
