"""`llava-tiny`: `questions.jsonl` next to `answers.jsonl`, images from a folder or drawn."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava.eval.prompts import bare_question
from llava.eval.rules.exact_match import is_correct
from llava.eval.tasks.base import Benchmark, Item, TaskError, register_benchmark
from llava.eval.tasks.files import (
    QUESTION,
    Fields,
    Kind,
    Row,
    check_fields,
    hash_files,
    index_by,
    is_file,
    read_json,
    read_jsonl,
)
from llava.images import open_image
from llava.pixels import VIEWER
from llava.shipped import LLAVA_TINY, shipped_path

ImageLoader = Callable[[str], Image.Image]


@register_benchmark
class QuestionFile(Benchmark):
    """Short questions with one right answer each, in LLaVA's question file format.

    Args:
        root: folder of `questions.jsonl` and `answers.jsonl`.
        image_folder: images by name, by default `root/images`. Where that does not exist either,
            images are drawn by `llava.world` and compared with the hashes in `root/manifest.json`.
    """

    name = "llava-tiny"
    title = "llava-tiny"
    protocols = {"llava": "the question as it is, answered in a word"}  # noqa: RUF012
    max_new_tokens = 8
    default_root = shipped_path(f"{LLAVA_TINY}/benchmark")
    pixels = VIEWER

    def __init__(
        self, root: Path, protocol: str | None = None, image_folder: Path | None = None
    ) -> None:
        super().__init__(root, protocol)
        if image_folder is not None and not image_folder.is_dir():
            raise TaskError(f"there is no image folder {image_folder}; check --image-folder")
        own = root / "images"
        self.image_folder = image_folder or (own if own.is_dir() else None)
        self._draw: ImageLoader | None = None

    def items(self) -> list[Item]:
        answers = _by_id(self.root, "answers", {"question_id": Kind.ID, "answer": Kind.ID})
        questions = _by_id(self.root, "questions", QUESTION)
        if not questions:
            raise TaskError(f"{self.root / 'questions.jsonl'} has no questions")
        unknown = [name for name in answers if name not in questions]
        if unknown:
            raise TaskError(
                f"{self.root / 'answers.jsonl'} answers question {unknown[0]}, which "
                "questions.jsonl does not ask"
            )
        items = []
        for index, (name, row) in enumerate(questions.items()):
            if name not in answers:
                raise TaskError(f"{self.root / 'answers.jsonl'} has no answer to question {name}")
            text = bare_question(row["text"])
            row = {"category": "all", **row}
            check_fields(row, f"question {name} of {self.root}", {"category": Kind.ID})
            data = {
                "category": str(row["category"]),
                "answer": str(answers[name]["answer"]),
            }
            items.append(Item(index, name, (row["image"],), text, text, data))
        return items

    def load_image(self, name: str) -> Image.Image:
        if self.image_folder is not None:
            return open_image(self.image_folder / name, self.pixels)
        if self._draw is None:
            self._draw = _world_loader(self.root / "manifest.json")
        return self._draw(name)

    def data_hash(self) -> str:
        files = [self.root / "questions.jsonl", self.root / "answers.jsonl"]
        if self.image_folder is None:
            return hash_files([*files, self.root / "manifest.json"])
        names = sorted({image for item in self.items() for image in item.images})
        images = {name: self.image_folder / name for name in names}
        files += [path for path in images.values() if is_file(path)]
        return hash_files(files, [(name, -1) for name in names if not is_file(images[name])])

    def item_score(self, item: Item, answer: str) -> float:
        return float(is_correct(answer, item.data["answer"]))

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """`accuracy`, and the accuracy of every category under its name."""
        categories: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            categories[item.data["category"]].append(item)
        return {"accuracy": items} | dict(sorted(categories.items()))


def _by_id(folder: Path, name: str, fields: Fields) -> dict[str, Row]:
    """Read objects of a JSONL file by their question id, with fields as `check_fields` has them."""
    path = folder / f"{name}.jsonl"
    rows = read_jsonl(path, fields=fields)
    rows = [row | {"question_id": str(row["question_id"])} for row in rows]
    return index_by(rows, "question_id", path)


def _world_loader(manifest: Path) -> ImageLoader:
    from llava.world import render

    content = read_json(manifest)
    try:
        hashes = dict(content)
    except (ValueError, TypeError) as error:
        raise TaskError(f"{manifest} must list hashes of images: {error}") from error

    def load(name: str) -> Image.Image:
        try:
            image = render(name)
        except ValueError as error:
            raise TaskError(f"{manifest.parent} has no folder of images, and {error}") from error
        if hashlib.sha256(image.tobytes()).hexdigest() != hashes.get(name):
            raise TaskError(f"{name} drawn here is not the image whose hash {manifest} records")
        return image

    return load
