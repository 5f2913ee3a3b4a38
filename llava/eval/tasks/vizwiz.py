"""VizWiz, test: questions of blind people about their photographs; scored on a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava.eval.converters.answers import write_json
from llava.eval.converters.vizwiz import submission
from llava.eval.tasks.base import Item, Metric, register_benchmark
from llava.eval.tasks.published import PublishedQuestions

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@register_benchmark
class VizWiz(PublishedQuestions):
    """A submission file; no figure is computed here."""

    name = "vizwiz"
    title = "VizWiz"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "test, told when to say Unanswerable; a submission file"
    }
    headline = ""

    def image_folder(self) -> Path:
        return self.root / "vizwiz/test"

    def question_file(self) -> Path:
        return self.root / "vizwiz/llava_test.jsonl"

    def bare(self, text: str) -> str:
        return super().bare(text).removesuffix(UNANSWERABLE).strip()

    def item_score(self, item: Item, answer: str) -> None:
        return None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        return {}

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The server's file. It takes complete ones only: one of a limited run is for reading."""
        rows = [{"question_id": item.question_id, "image": item.images[0]} for item in items]
        results = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        return [write_json(folder / "vizwiz_submission.json", submission(rows, results))]
