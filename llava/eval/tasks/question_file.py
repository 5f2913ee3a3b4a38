"""LLaVA question files: `questions.jsonl` beside `answers.jsonl`, images by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.utils import UserInputError

ImageLoader = Callable[[str], Image.Image]


class TaskError(UserInputError):
    """The question or answer file cannot be used; the message says why."""


@dataclass(frozen=True)
class Question:
    """One question about one image. `index` is its line number in the question file, from 0."""

    index: int
    question_id: str
    image: str
    text: str
    family: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Questions in plan order and a hash of everything they were read from."""

    questions: tuple[Question, ...]
    load_image: ImageLoader
    data_hash: str


def load_task(folder: Path, limit: int = 0, image_folder: Path | None = None) -> Task:
    """Read the benchmark in `folder`; its first `limit` questions (0 = all), grouped by image.

    Grouping is stable (images in order of first appearance), so that questions about one image
    meet in one batch and share its encoding. Images come from `image_folder`, or are rendered by
    `llava.world` where none is given.
    """
    answers = {str(row["question_id"]): str(row["answer"]) for row in _rows(folder, "answers")}
    questions = []
    for index, row in enumerate(_rows(folder, "questions")):
        if limit and index >= limit:
            break
        name = str(row["question_id"])
        if name not in answers:
            raise TaskError(f"{folder / 'answers.jsonl'} has no answer to question {name}")
        family = str(row.get("category", "all"))
        questions.append(
            Question(index, name, str(row["image"]), str(row["text"]), family, answers[name])
        )
    if not questions:
        raise TaskError(f"{folder / 'questions.jsonl'} holds no question")
    loader = _folder_loader(image_folder) if image_folder else _render
    images = sorted({question.image for question in questions}) if image_folder else []
    digest = _hash_data(folder, [image_folder / image for image in images] if image_folder else [])
    return Task(group_by_image(questions), loader, digest)


def group_by_image(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The same questions, those of one image side by side, images by first appearance."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    return tuple(question for group in groups.values() for question in group)


def other_images(questions: Sequence[Question]) -> dict[str, str] | None:
    """For each image the one that stands in for it in the shuffled control; None if only one.

    It is the next image of the plan (the first follows the last): fixed by the plan alone, whatever
    the batch size, and at most one image more to encode per batch.
    """
    images = list(dict.fromkeys(question.image for question in questions))
    if len(images) < 2:
        return None
    return dict(zip(images, images[1:] + images[:1], strict=True))


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error
    return [json.loads(line) for line in lines if line.strip()]


def _hash_data(folder: Path, images: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in (folder / "questions.jsonl", folder / "answers.jsonl", *images):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise TaskError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _folder_loader(folder: Path) -> ImageLoader:
    def load(name: str) -> Image.Image:
        with Image.open(folder / name) as image:
            return image.convert("RGB")

    return load


def _render(name: str) -> Image.Image:
    from llava.world import render

    return render(name.removesuffix(".png"))
