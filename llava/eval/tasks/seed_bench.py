"""SEED-Bench: options about images, and about the middle frames of videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.converters.answers import question_key
from llava.eval.converters.seed_bench import read_annotations, upload
from llava.eval.scorers.seed_bench import is_correct
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import OPTION_LETTER, check_ids
from llava.eval.tasks.published import PublishedQuestions, Row
from llava.storage import write_atomically


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

    def image_folder(self) -> Path:
        return self.root / "seed_bench"

    def question_file(self) -> Path:
        return self.root / "seed_bench/llava-seed-bench.jsonl"

    def annotation_files(self) -> list[Path]:
        return [self.root / "seed_bench/SEED-Bench.json"]

    def bare(self, text: str) -> str:
        return text.removesuffix(OPTION_LETTER).strip()

    def rows(self) -> list[Row]:
        """Under `image` the questions about videos are left out."""
        rows, truth, path = super().rows(), self._truth(), self.annotation_files()[0]
        names = [question_key(row["question_id"]) for row in rows]
        check_ids(names, truth, self.question_file(), path)
        if self.protocol == "all":
            return rows
        kept = [row for name, row in zip(names, rows, strict=True) if _about_image(truth[name])]
        if not kept:
            raise TaskError(f"{self.question_file()} holds no question about an image")
        return kept

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        truth = self._truth()
        keys = ("answer", "data_type", "question_type_id")
        found = (truth[question_key(row["question_id"])] for row in rows)
        return ({key: question[key] for key in keys} for question in found)

    def item_score(self, item: Item, answer: str) -> float:
        return float(is_correct(answer, item.data["answer"]))

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`image_accuracy`; under `all` also `video_accuracy` and `accuracy` of both together."""
        scores = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        places = {
            "image_accuracy": [i for i, item in enumerate(items) if _about_image(item.data)],
            "video_accuracy": [i for i, item in enumerate(items) if not _about_image(item.data)],
        }
        if self.protocol == "all":
            places["accuracy"] = list(range(len(items)))
        return {
            name: metric_of([scores[i] for i in chosen], [items[i].images for i in chosen])
            for name, chosen in places.items()
            if chosen
        }

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """What the leaderboard takes: {question_id, prediction} a line, as far as answered."""
        given = {
            question_key(item.question_id): answer
            for item, answer in zip(items, answers, strict=True)
        }
        asked = {name: row for name, row in self._truth().items() if name in given}
        path = folder / "seed_submission.jsonl"
        write_atomically(path, upload(list(asked.values()), [given[name] for name in asked]))
        return [path]

    def _truth(self) -> dict[str | int, dict[str, Any]]:
        questions, _ = read_annotations(self.annotation_files()[0], self.name)
        return {question_key(question["question_id"]): question for question in questions}


def _about_image(question: Mapping[str, Any]) -> bool:
    return question["data_type"] == "image"
