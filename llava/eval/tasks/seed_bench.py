"""SEED-Bench: options about images, and about the middle frames of videos.

The score is LLaVA's (`convert_seed_for_submission`): the answer is the letter and nothing else. "a"
and "A." are wrong.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    Kind,
    Row,
    check_ids,
    check_listed,
    is_id,
    question_key,
    read_json,
    with_options,
)
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, question_line

FIELDS = {
    "question_id": Kind.ID,
    "question_type_id": Kind.ID,
    "data_type": Kind.TEXT,
    "answer": Kind.TEXT,
}
DATA_TYPES = ("image", "video")
TYPES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
    "Action Recognition",
    "Action Prediction",
    "Procedure Understanding",
)
ROWS = Dataset(
    "lmms-lab/SEED-Bench",
    "question_id question_type_id data_type data_id question answer choice_a choice_b choice_c "
    "choice_d image",
)


def read_annotations(
    path: Path, task: str | None = None
) -> tuple[dict[str | int, Row], dict[int, str]]:
    """Read {id by `question_key`: question} of `SEED-Bench.json`, and {question type: its name}.

    Raises:
        TaskError: the file cannot be used.
    """
    content = read_json(path, task)
    questions = content.get("questions") if isinstance(content, dict) else None
    types = content.get("question_type") if isinstance(content, dict) else None
    if not isinstance(questions, list) or not questions or not isinstance(types, dict):
        raise TaskError(
            f"{path} must contain `questions` and `question_type`; is it SEED-Bench.json?"
        )
    if not all(isinstance(kind, int) and is_id(kind) for kind in types.values()):
        raise TaskError(f"`question_type` of {path} must give every type a number")
    names = {kind: name for name, kind in types.items()}
    found: dict[str | int, Row] = {}
    rows = check_listed(questions, "question", path, FIELDS)
    for number, question in enumerate(rows, start=1):
        where = f"question {number} of {path}"
        if question["data_type"] not in DATA_TYPES:
            raise TaskError(
                f"data_type in {where} is {question['data_type']!r}; one of {', '.join(DATA_TYPES)}"
            )
        if question["question_type_id"] not in names:
            raise TaskError(
                f"question_type_id in {where} is {question['question_type_id']!r}, which "
                "`question_type` does not name"
            )
        key = question_key(question["question_id"])
        if key in found:
            raise TaskError(f"{where} has the question_id {key!r} of one before it; keep one")
        found[key] = question
    return found, names


def report(questions: Iterable[Row], types: Mapping[int, str], right: Sequence[bool]) -> list[str]:
    """Return the lines that LLaVA prints: each type, all, images, videos."""
    by_type: dict[int, list[bool]] = defaultdict(list)
    by_data: dict[str, list[bool]] = defaultdict(list)
    for question, value in zip(questions, right, strict=True):
        by_type[question["question_type_id"]].append(value)
        by_data[question["data_type"]].append(value)
    return [
        *(f"{types[kind]}: {_percent(by_type[kind])}" for kind in sorted(by_type)),
        f"Total accuracy: {_percent(right)}",
        *(f"{data_type} accuracy: {_percent(by_data[data_type])}" for data_type in DATA_TYPES),
    ]


def upload(questions: Mapping[str | int, Row], answers: Mapping[str | int, str]) -> str:
    """Return the upload file: a line an answer, in the annotation's order, with the ids there."""
    return "".join(
        json.dumps({"question_id": question["question_id"], "prediction": answers[name]}) + "\n"
        for name, question in questions.items()
        if name in answers
    )


def _percent(right: Sequence[bool]) -> str:
    return f"{sum(right) / len(right) * 100:.2f}%" if right else "n/a"


@register_benchmark
class SEEDBench(PublishedQuestions):
    """The letter and nothing else counts; standard errors are clustered by image."""

    name = "seed"
    title = "SEED"
    protocols: ClassVar[Mapping[str, str]] = {
        "image": "questions about images only",
        "all": "images, and videos as their middle frame",
    }
    headline = "image_accuracy"
    image_path = "seed_bench"
    question_path = "seed_bench/llava-seed-bench.jsonl"
    annotation_paths = ("seed_bench/SEED-Bench.json",)
    submission_file = "seed_submission.jsonl"

    def bare(self, text: str) -> str:
        return text.removesuffix(OPTION_LETTER).strip()

    def rows(self) -> list[Row]:
        """Read all prompts, under `image` without the questions about videos."""
        rows, truth, path = super().rows(), self._truth(), self.annotation_files()[0]
        names = [question_key(row["question_id"]) for row in rows]
        check_ids(names, truth, self.question_file(), path)
        if self.protocol == "all":
            return rows
        kept = [row for name, row in zip(names, rows, strict=True) if _about_image(truth[name])]
        if not kept:
            raise TaskError(f"{self.question_file()} has no questions about images")
        return kept

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        truth = self._truth()
        keys = ("answer", "data_type", "question_type_id")
        found = (truth[question_key(row["question_id"])] for row in rows)
        return ({key: question[key] for key in keys} for question in found)

    def item_score(self, item: Item, answer: str) -> float:
        return float(answer == item.data["answer"])

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """`image_accuracy`; under `all` also `video_accuracy` and `accuracy` of both together."""
        groups: dict[str, Sequence[Item]] = {
            "image_accuracy": [item for item in items if _about_image(item.data)],
            "video_accuracy": [item for item in items if not _about_image(item.data)],
        }
        return groups | {"accuracy": items} if self.protocol == "all" else groups

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return what the leaderboard takes, of what is answered."""
        names = [question_key(item.question_id) for item in items]
        return upload(self._truth(), dict(zip(names, answers, strict=True)))

    def sources(self) -> Sources:
        originals = (
            f"{ARCHIVE}, SEED-Bench.json, its image archive, and for `all` the middle frames of "
            "its videos"
        )
        count = 14_233 if self.protocol == "image" else None
        return self.published(count, originals, build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        """Make both files; of a video take the middle one of its frames."""
        truth, prompts = [], []
        for row in read(ROWS):
            name, frames = row["question_id"], row["image"]
            image = f"SEED-Bench-image/{row['data_id']}"
            if row["data_type"] == "video":
                image = f"SEED-Bench-video-image/{name}.png"
            layout.image(self.image_folder() / image, frames[len(frames) // 2] if frames else None)
            keys = ("question_id", "question_type_id", "data_type", "answer", "question")
            truth.append({key: row[key] for key in keys})
            options = [row[f"choice_{letter}"] for letter in "abcd"]
            text = with_options(row["question"], options) + OPTION_LETTER
            prompts.append(question_line(name, image, text, row["data_type"]))
        types = {name: number for number, name in enumerate(TYPES, start=1)}
        layout.json(self.annotation_files()[0], {"questions": truth, "question_type": types})
        layout.lines(self.question_file(), prompts)

    def _truth(self) -> dict[str | int, Row]:
        return read_annotations(self.annotation_files()[0], self.name)[0]


def _about_image(question: Mapping[str, Any]) -> bool:
    return question["data_type"] == "image"
