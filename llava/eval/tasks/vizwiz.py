"""VizWiz, test: questions of blind people about their photographs; scored on a server."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llava import constants
from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.rules.vqa import normalise
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, Row
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, question_line

UNANSWERABLE = f"\n{constants.UNANSWERABLE}"
ROWS = Dataset("lmms-lab/VizWiz-VQA", "question_id question image")


def submission(split: Sequence[Row], results: Mapping[Any, str]) -> list[Row]:
    """Return [{image, answer}] for every question of `split`; TaskError where one has no result."""
    missing = [row["question_id"] for row in split if row["question_id"] not in results]
    if missing:
        raise TaskError(
            f"no result for {len(missing)} of {len(split)} VizWiz questions, the first is "
            f"{missing[0]!r}; the server takes complete submissions only"
        )
    return [
        {"image": row["image"], "answer": normalise(results[row["question_id"]])} for row in split
    ]


@register_benchmark
class VizWiz(PublishedQuestions):
    """A submission file; no figure is computed here."""

    name = "vizwiz"
    title = "VizWiz"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "test, told when to say Unanswerable; a submission file"
    }
    headline = ""
    image_path = "vizwiz/test"
    question_path = "vizwiz/llava_test.jsonl"
    submission_file = "vizwiz_submission.json"

    def bare(self, text: str) -> str:
        return super().bare(text).removesuffix(UNANSWERABLE).strip()

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the server's file. It takes complete ones: one of a limited run is for reading."""
        rows = [{"question_id": item.question_id, "image": item.images[0]} for item in items]
        results = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        return json.dumps(submission(rows, results))

    def sources(self) -> Sources:
        return self.published(8_000, f"{ARCHIVE}, and VizWiz's test.zip", build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        prompts = []
        for row in read(ROWS):
            name = row["question_id"]
            layout.image(self.image_folder() / name, row["image"])
            prompts.append(question_line(name, name, row["question"] + UNANSWERABLE + SHORT_ANSWER))
        layout.lines(self.question_file(), prompts)
