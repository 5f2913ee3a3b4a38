"""Benchmarks whose prompts LLaVA publishes as JSON lines, one image each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.tasks.base import Benchmark, Item, TaskError
from llava.eval.tasks.files import SHORT_ANSWER, ImageFolder, hash_files, index_by, read_jsonl

Row = dict[str, Any]


class PublishedQuestions(Benchmark):
    """Short-answer questions in published order, with the annotations that belong to them.

    Class attributes, beside those of `Benchmark`:
        unique_ids: whether a question id may stand once only in the question file.
    """

    max_new_tokens = 128
    unique_ids: ClassVar[bool] = True

    @abstractmethod
    def image_folder(self) -> Path:
        """Where images lie by the names that the question file gives them."""

    @abstractmethod
    def question_file(self) -> Path:
        """The file with lines {question_id, image, text}."""

    def annotation_files(self) -> list[Path]:
        """Every file that `annotate` reads."""
        return []

    def annotate(self, rows: Sequence[Row]) -> Iterable[Mapping[str, Any]]:
        """`Item.data` of each row, in order. Raises TaskError where annotations do not fit."""
        return ({} for _ in rows)

    def rows(self) -> list[Row]:
        """{question_id, image, text} of every prompt."""
        return self.read_questions(self.question_file())

    def bare(self, text: str) -> str:
        """The question in a prompt."""
        return text.removesuffix(SHORT_ANSWER).strip()

    def read_questions(self, path: Path) -> list[Row]:
        """Lines of a question file; TaskError for a damaged, repeated or odd one, or for none."""
        rows = read_jsonl(path, self.name, ids=("question_id",), texts=("image", "text"))
        if self.unique_ids:
            index_by(rows, "question_id", path)
        if not rows:
            raise TaskError(f"{path} holds no question")
        return rows

    @property
    def images(self) -> ImageFolder:
        return ImageFolder(self.image_folder(), self.name)

    def items(self) -> list[Item]:
        return list(self._items)

    def load_image(self, name: str) -> Image.Image:
        return self.images.load(name, self.pixels)

    def data_hash(self) -> str:
        names = (item.images[0] for item in self._items)  # reads the files, with their errors
        return hash_files(
            [self.question_file(), *self.annotation_files()], self.images.sizes(names)
        )

    @cached_property
    def _items(self) -> list[Item]:
        rows = self.rows()
        return [
            Item(
                index,
                row["question_id"],
                (row["image"],),
                row["text"],
                self.bare(row["text"]),
                data,
            )
            for index, (row, data) in enumerate(zip(rows, self.annotate(rows), strict=True))
        ]
