"""GQA, test-dev balanced: 12,578 compositional questions about 398 images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.converters.answers import write_json
from llava.eval.converters.gqa import predictions
from llava.eval.scorers.gqa import clean, judge
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import check_ids, read_json
from llava.eval.tasks.published import PublishedQuestions, Row

PREDICTIONS = "testdev_balanced_predictions.json"
NEEDED = ("isBalanced", "answer", "imageId", "types")


@register_benchmark
class GQA(PublishedQuestions):
    """Exact match on balanced questions; questions of one image are one cluster of the error."""

    name = "gqa"
    title = "GQA"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "test-dev balanced, single word or phrase"}
    headline = "accuracy"

    def image_folder(self) -> Path:
        return self.root / "gqa/data/images"

    def question_file(self) -> Path:
        return self.root / "gqa/llava_gqa_testdev_balanced.jsonl"

    def annotation_files(self) -> list[Path]:
        """GQA's archive unpacks to a folder of its version, users often move its files up."""
        name = "testdev_balanced_questions.json"
        folder = self.root / "gqa/data"
        places = [folder / name, folder / "questions1.2" / name, folder / "questions" / name]
        return [next((path for path in places if path.is_file()), places[0])]

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        path = self.annotation_files()[0]
        questions = read_json(path, self.name)
        if not isinstance(questions, dict):
            raise TaskError(f"{path} is no JSON object of questions by their id")
        check_ids((row["question_id"] for row in rows), questions, self.question_file(), path)
        asked = {row["question_id"] for row in rows}
        for name, question in questions.items():
            if not isinstance(question, dict) or not question.keys() >= set(NEEDED):
                raise TaskError(f"question {name} of {path} lacks one of {', '.join(NEEDED)}")
            types, texts = question["types"], (question["answer"], question["imageId"])
            if not isinstance(types, dict) or "structural" not in types:
                raise TaskError(f"question {name} of {path} lacks its structural type")
            if not all(isinstance(text, str) for text in texts):
                raise TaskError(f"answer or imageId of question {name} of {path} is no text")
            if not isinstance(question["isBalanced"], bool):
                raise TaskError(f"isBalanced of question {name} of {path} is not true or false")
            if question["isBalanced"] and name not in asked:
                raise TaskError(
                    f"{self.question_file()} does not ask the balanced question {name} of {path}; "
                    "GQA is scored on all of them (--limit takes the first ones)"
                )
        return ({key: questions[row["question_id"]][key] for key in NEEDED} for row in rows)

    def item_score(self, item: Item, answer: str) -> float | None:
        right = float(clean(answer) == item.data["answer"])
        return right if item.data["isBalanced"] else None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`accuracy`, and that of `binary` and `open` questions, where there are any."""
        questions = {str(item.question_id): item.data for item in items}
        cleaned = [clean(answer) for answer in answers]
        judged = judge(questions, dict(zip(questions, cleaned, strict=True)))
        groups = {
            "accuracy": judged,
            "binary": [question for question in judged if not question.open],
            "open": [question for question in judged if question.open],
        }
        return {
            name: metric_of([row.correct for row in group], [row.image for row in group])
            for name, group in groups.items()
            if group
        }

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The file that GQA's evaluation script reads."""
        rows = (
            {"question_id": item.question_id, "text": answer}
            for item, answer in zip(items, answers, strict=True)
        )
        return [write_json(folder / PREDICTIONS, predictions(rows))]
