"""LLaVA question files: `questions.jsonl` beside `answers.jsonl`, images by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.images import load_image
from llava.utils import UserInputError

ImageLoader = Callable[[str], Image.Image]


class TaskError(UserInputError):
    """Questions, answers or images cannot be used; the message says why."""


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
    meet in one batch and share its encoding. Images come from `image_folder`. Where none is given
    they are drawn by `llava.world` and held against the hashes in `manifest.json`.
    """
    answers = {
        str(row["question_id"]): str(row["answer"])
        for row in _rows(folder, "answers", ("question_id", "answer"))
    }
    questions = []
    for index, row in enumerate(_rows(folder, "questions", ("question_id", "image", "text"))):
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
    inputs = [folder / "questions.jsonl", folder / "answers.jsonl"]
    if image_folder is None:
        inputs.append(folder / "manifest.json")
        loader = _world_loader(inputs[-1])
    else:
        inputs += [image_folder / name for name in sorted({row.image for row in questions})]
        loader = _folder_loader(image_folder)
    return Task(group_by_image(questions), loader, _hash_files(inputs))


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


def _rows(folder: Path, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Objects of a JSONL file, each with at least `keys`."""
    path = folder / f"{name}.jsonl"
    text = _read(path)
    try:
        rows = [json.loads(line) for line in text.decode("utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise TaskError(f"{path} is not JSON lines: {error}") from error
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise TaskError(f"record {number} of {path} lacks {', '.join(missing)}")
    return rows


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(_read(path)).digest())
    return digest.hexdigest()


def _folder_loader(folder: Path) -> ImageLoader:
    return lambda name: load_image(folder / name)


def _world_loader(manifest: Path) -> ImageLoader:
    from llava.world import render

    text = _read(manifest)
    try:
        hashes = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise TaskError(f"{manifest} holds no hashes of images: {error}") from error

    def load(name: str) -> Image.Image:
        image = render(name)
        if hashlib.sha256(image.tobytes()).hexdigest() != hashes.get(name):
            raise TaskError(f"{name} drawn here is not the image whose hash {manifest} records")
        return image

    return load
