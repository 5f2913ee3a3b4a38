"""GQA, test-dev balanced: 12,578 compositional questions about 398 images.

Source of the score: the evaluation script of GQA (Hudson and Manning, 2019), exact match on the
balanced questions. Its validity and plausibility need files that version 1.2 of the dataset does
not have, and LLaVA's protocol leaves them out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, Kind, Row, check_fields, check_ids, read_json
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, answer_lines, question_line

NEEDED = {"isBalanced": Kind.ANY, "answer": Kind.TEXT, "imageId": Kind.TEXT, "types": Kind.ANY}
IMAGES = Dataset("lmms-lab/GQA", "id image", "testdev", "testdev_balanced_images")
QUESTIONS = Dataset(
    "lmms-lab/GQA",
    "id imageId question answer isBalanced types",
    "testdev",
    "testdev_balanced_instructions",
)


def clean(text: str) -> str:
    """Return an answer as LLaVA compares it: lower case, no periods at its end."""
    return text.rstrip(".").lower()


def predictions(rows: Iterable[Row]) -> list[Row]:
    """Return [{questionId, prediction}] for GQA's scorer, of lines of an answer file."""
    return [{"questionId": row["question_id"], "prediction": clean(row["text"])} for row in rows]


@register_benchmark
class GQA(PublishedQuestions):
    """Exact match on balanced questions; questions of one image are one cluster of the error."""

    name = "gqa"
    title = "GQA"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "test-dev balanced, single word or phrase"}
    image_path = "gqa/data/images"
    question_path = "gqa/llava_gqa_testdev_balanced.jsonl"
    submission_file = "testdev_balanced_predictions.json"

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
            raise TaskError(f"{path} must be a JSON object of questions by their id")
        check_ids((row["question_id"] for row in rows), questions, self.question_file(), path)
        asked = {row["question_id"] for row in rows}
        for name, question in questions.items():
            _check(question, f"question {name} of {path}")
            if question["isBalanced"] and name not in asked:
                raise TaskError(
                    f"{self.question_file()} does not ask the balanced question {name} of {path}; "
                    "GQA is scored on all of them (--limit takes the first ones)"
                )
        return ({key: questions[row["question_id"]][key] for key in NEEDED} for row in rows)

    def item_score(self, item: Item, answer: str) -> float | None:
        right = float(clean(answer) == item.data["answer"])
        return right if item.data["isBalanced"] else None

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """`accuracy`, and that of `open` questions, which ask for a word, and the `binary` rest."""
        binary = [item for item in items if item.data["types"]["structural"] != "query"]
        for_word = [item for item in items if item.data["types"]["structural"] == "query"]
        return {"accuracy": items, "binary": binary, "open": for_word}

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the file that GQA's evaluation script reads."""
        return json.dumps(predictions(answer_lines(items, answers)))

    def sources(self) -> Sources:
        originals = f"{ARCHIVE}, and GQA's questions1.2.zip and images.zip"
        return self.published(12_578, originals, build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        for row in read(IMAGES):
            layout.image(self.image_folder() / f"{row['id']}.jpg", row["image"])
        keys = QUESTIONS.columns.split()
        truth = {row["id"]: {key: row[key] for key in keys} for row in read(QUESTIONS)}
        layout.json(self.annotation_files()[0], truth)
        prompts = [
            question_line(name, f"{row['imageId']}.jpg", row["question"] + SHORT_ANSWER)
            for name, row in truth.items()
        ]
        layout.lines(self.question_file(), prompts)


def _check(question: Any, where: str) -> None:
    """Refuse an annotation that lacks what is needed.

    Raises:
        TaskError: a field is missing or of another kind; the message names `where`.
    """
    check_fields(question, where, NEEDED)
    types = question["types"]
    if not isinstance(types, dict) or "structural" not in types:
        raise TaskError(f"{where} lacks its structural type")
    if not isinstance(question["isBalanced"], bool):
        raise TaskError(f"isBalanced of {where} must be true or false")
