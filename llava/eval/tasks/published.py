"""Benchmarks of question files and folders of images, as LLaVA publishes them."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.tasks.base import Benchmark, Item, Sources, TaskError
from llava.eval.tasks.files import (
    QUESTION,
    SHORT_ANSWER,
    ImageFolder,
    Row,
    hash_files,
    index_by,
    read_jsonl,
)

ARCHIVE = "LLaVA's evaluation archive eval.zip"


class FolderBenchmark(Benchmark):
    """A benchmark whose images lie in one folder; its files are read once.

    Class attributes, besides those of `Benchmark`, below the data root:
        image_path: the folder of images.
        question_path: the file of questions.
        annotation_paths: every other file that `read_items` reads.
    """

    image_path: ClassVar[str]
    question_path: ClassVar[str]
    annotation_paths: ClassVar[Sequence[str]] = ()

    def image_folder(self) -> Path:
        """Return where images lie by the names that items give them."""
        return self.root / self.image_path

    def question_file(self) -> Path:
        """Return the file of questions."""
        return self.root / self.question_path

    def annotation_files(self) -> list[Path]:
        """Return every other file that `read_items` reads."""
        return [self.root / path for path in self.annotation_paths]

    def files(self) -> list[Path]:
        """Return every file that `read_items` reads."""
        return [self.question_file(), *self.annotation_files()]

    @abstractmethod
    def read_items(self) -> list[Item]:
        """Read all prompts in published order.

        Raises:
            TaskError: the files cannot be used.
        """

    def published(self, count: int | None, originals: str, **more: Any) -> Sources:
        """Return `Sources` of all `files` and of the folder of images."""
        return Sources(count, self.files(), self.image_folder(), originals, **more)

    @property
    def images(self) -> ImageFolder:
        return ImageFolder(self.image_folder(), self.name)

    def items(self) -> list[Item]:
        return list(self._items)

    def load_image(self, name: str) -> Image.Image:
        return self.images.load(name, self.pixels)

    def data_hash(self) -> str:
        names = [name for item in self._items for name in item.images]  # reads files, with errors
        return hash_files(self.files(), self.images.sizes(names))

    @cached_property
    def _items(self) -> list[Item]:
        return self.read_items()


class PublishedQuestions(FolderBenchmark):
    """Prompts published as lines {question_id, image, text}, with the annotations of each.

    Class attributes, besides those of `FolderBenchmark`:
        unique_ids: whether a question id may occur only once in the question file.
    """

    unique_ids: ClassVar[bool] = True

    def annotate(self, rows: Sequence[Row]) -> Iterable[Mapping[str, Any]]:
        """Return `Item.data` of each row, in order.

        Raises:
            TaskError: rows and annotations do not fit.
        """
        return ({} for _ in rows)

    def rows(self) -> list[Row]:
        """Read {question_id, image, text} of every prompt."""
        return self.read_questions(self.question_file())

    def bare(self, text: str) -> str:
        """Return the question in a prompt."""
        return text.removesuffix(SHORT_ANSWER).strip()

    def read_questions(self, path: Path) -> list[Row]:
        """Read lines of a question file; TaskError for a damaged, repeated or odd one, or none."""
        rows = read_jsonl(path, self.name, fields=QUESTION)
        if self.unique_ids:
            index_by(rows, "question_id", path)
        if not rows:
            raise TaskError(f"{path} has no questions")
        return rows

    def read_items(self) -> list[Item]:
        rows = self.rows()
        pairs = enumerate(zip(rows, self.annotate(rows), strict=True))
        return [
            Item(i, row["question_id"], (row["image"],), row["text"], self.bare(row["text"]), data)
            for i, (row, data) in pairs
        ]


def question_line(name: str | int, image: str, text: str, category: str = "default") -> Row:
    """Return a line of LLaVA's question files."""
    return {"question_id": name, "image": image, "text": text, "category": category}


def answer_lines(items: Sequence[Item], answers: Sequence[str]) -> list[Row]:
    """Return the lines of LLaVA's answer files, which its converters and reviews read."""
    return [
        {"question_id": item.question_id, "prompt": item.text, "text": answer}
        for item, answer in zip(items, answers, strict=True)
    ]
