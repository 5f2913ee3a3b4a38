"""MMMU: college questions with one to seven images, options or an open answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.scorers.mmmu import open_is_correct, parse_choice, parse_open
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Benchmark, Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    SHORT_ANSWER,
    ImageFolder,
    hash_files,
    index_by,
    is_id,
    read_jsonl,
    shown,
)
from llava.storage import dump_json, write_atomically

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DOMAINS: dict[str, tuple[str, ...]] = {
    "art_and_design": ("Art", "Art_Theory", "Design", "Music"),
    "business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "health_and_medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "humanities_and_social_science": ("History", "Literature", "Sociology", "Psychology"),
    "tech_and_engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
QUESTION_TYPES = ("multiple-choice", "open")
_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_IMAGE = re.compile(r"<image (\d+)>")


@register_benchmark
class MMMU(Benchmark):
    """The prompt of lmms-eval: "<image 1>" stays in the text, the images stand before it.

    `mmmu/validation.jsonl` has lines {id, question, options, answer, question_type}; image n of a
    question is `mmmu/images/<id>_<n>.png`. Every question has images of its own, so standard errors
    need no clusters.
    """

    name = "mmmu"
    title = "MMMU"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "validation, the option's letter or a phrase"
    }
    max_new_tokens = 128
    headline = "accuracy"

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        super().__init__(root, protocol)
        self.path = root / "mmmu" / "validation.jsonl"
        self.images = ImageFolder(root / "mmmu" / "images", self.name)

    def items(self) -> list[Item]:
        return list(self._items)

    def load_image(self, name: str) -> Image.Image:
        return self.images.load(name, self.pixels)

    def data_hash(self) -> str:
        names = [name for item in self._items for name in item.images]
        return hash_files([self.path], self.images.sizes(names))

    def item_score(self, item: Item, answer: str) -> float:
        if options := item.data["options"]:
            choices = dict(zip(LETTERS, options, strict=False))
            right = parse_choice(answer, choices, str(item.question_id)) == item.data["answers"][0]
        else:
            right = open_is_correct(parse_open(answer), item.data["answers"])
        return float(right)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`accuracy` over all questions, and over those of each domain under its name."""
        scores = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        groups: dict[str, list[float]] = {"accuracy": scores} | {name: [] for name in DOMAINS}
        for item, value in zip(items, scores, strict=True):
            groups[item.data["domain"]].append(value)
        return {name: metric_of(values) for name, values in groups.items() if values}

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """`{id: answer}`, which the official scripts parse and score."""
        path = folder / "mmmu_answers.json"
        given = zip(items, answers, strict=True)
        write_atomically(path, dump_json({str(item.question_id): text for item, text in given}))
        return [path]

    @cached_property
    def _items(self) -> list[Item]:
        keys = ("options", "answer", "question_type")
        rows = read_jsonl(self.path, self.name, keys, texts=("question",), ids=("id",))
        if not rows:
            raise TaskError(f"{self.path} holds no question")
        return [self._item(*pair) for pair in enumerate(index_by(rows, "id", self.path).values())]

    def _item(self, index: int, row: Mapping[str, Any]) -> Item:
        name, where = str(row["id"]), f"question {row['id']!r} of {self.path}"
        subject = name.split("_", 1)[-1].rpartition("_")[0]
        if subject not in _DOMAIN_OF:
            raise TaskError(f"{where} must have an id like validation_Accounting_1")
        options = _as_list(row["options"], where)
        answers = _references(row["answer"], where)
        if not answers:
            raise TaskError(f"{where} has no answer")
        if row["question_type"] not in QUESTION_TYPES:
            raise TaskError(
                f"question_type of {where} is {shown(row['question_type'])}; one of "
                f"{', '.join(QUESTION_TYPES)}"
            )
        if row["question_type"] == "multiple-choice":
            if not options or answers[0] not in list(LETTERS[: len(options)]):
                raise TaskError(f"{where} needs options, and the letter of one as its answer")
            pairs = zip(LETTERS, options, strict=False)
            lines = [f"{letter}. {option}" for letter, option in pairs]
            text = "\n".join([row["question"], *lines]) + "\n" + OPTION_LETTER
        else:
            options, text = [], row["question"] + "\n" + SHORT_ANSWER
        numbers = sorted(set(map(int, _IMAGE.findall(text))))
        return Item(
            index,
            row["id"],
            tuple(f"{name}_{number}.png" for number in numbers),
            text,
            row["question"],
            {"options": options, "answers": answers, "domain": _DOMAIN_OF[subject]},
        )


def _references(answer: Any, where: str) -> list[str]:
    """Every accepted answer: an open question's may be a list, written as a Python literal."""
    if isinstance(answer, str) and answer.startswith("["):
        try:
            answer = ast.literal_eval(answer)
        except _NO_LITERAL:  # text that begins with a bracket: [0, 1)
            return [answer]
    return _words(answer if isinstance(answer, list) else [answer], f"the answer of {where}")


def _as_list(value: Any, where: str) -> list[str]:
    """A list of texts, which the published files write as Python literals; null is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except _NO_LITERAL as error:
            raise TaskError(f"{where} is damaged: {value[:60]!r} is no list") from error
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise TaskError(f"{where} is damaged: {value!r} is no list")
    return _words(value, f"an option of {where}")


def _words(values: Sequence[Any], what: str) -> list[str]:
    """Texts and numbers as text. Raises TaskError for anything else, calling it `what`."""
    for value in values:
        if not isinstance(value, float) and not is_id(value):
            raise TaskError(f"{what} is no text or number but {value!r}"[:200])
    return [str(value) for value in values]
