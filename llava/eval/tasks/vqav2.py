"""VQAv2: open questions about COCO images; val is scored here, test-dev on a server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.converters.answers import write_json
from llava.eval.converters.vqav2 import submission
from llava.eval.rules.vqa import normalise
from llava.eval.scorers.vqa_accuracy import vqav2_accuracy
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import (
    SHORT_ANSWER,
    check_fields,
    check_ids,
    check_listed,
    index_by,
    read_json,
)
from llava.eval.tasks.published import PublishedQuestions, Row

VAL = "val"
_NUMBER = re.compile(r"[0-9]{1,12}")  # of an image, as COCO's file names have room for


@register_benchmark
class VQAv2(PublishedQuestions):
    """VQA accuracy of EvalAI-normalised answers, the error clustered by image."""

    name = "vqav2"
    title = "VQAv2"
    protocols: ClassVar[Mapping[str, str]] = {
        VAL: "val2014, scored locally; not comparable with published test-dev figures",
        "test-dev": "test-dev2015, a submission file for the server",
    }
    headline = "accuracy"

    def image_folder(self) -> Path:
        return self.root / "vqav2" / ("val2014" if self.protocol == VAL else "test2015")

    def question_file(self) -> Path:
        name = "llava_vqav2_mscoco_test-dev2015.jsonl"
        if self.protocol == VAL:
            name = "v2_OpenEnded_mscoco_val2014_questions.json"
        return self.root / "vqav2" / name

    def annotation_files(self) -> list[Path]:
        """Human answers of val; for test-dev the whole test split, which a submission covers."""
        name = "llava_vqav2_mscoco_test2015.jsonl"
        if self.protocol == VAL:
            name = "v2_mscoco_val2014_annotations.json"
        return [self.root / "vqav2" / name]

    def rows(self) -> list[Row]:
        """Of val from VQA's own question file: LLaVA publishes none."""
        if self.protocol != VAL:
            return super().rows()
        path = self.question_file()
        questions = _listed(path, "questions", ("question_id", "image_id", "question"), self.name)
        index_by(questions, "question_id", path)
        for row in questions:
            where = f"question {row['question_id']!r} of {path}"
            if not isinstance(row["question"], str) or not _NUMBER.fullmatch(str(row["image_id"])):
                raise TaskError(
                    f"{where} is damaged: its question must be text, its image_id a number"
                )
            check_fields(row, where, texts=("question",))
        return [
            {
                "question_id": row["question_id"],
                "image": f"COCO_val2014_{int(row['image_id']):012d}.jpg",
                "text": row["question"] + SHORT_ANSWER,
            }
            for row in questions
        ]

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        path, names = self.annotation_files()[0], [row["question_id"] for row in rows]
        if self.protocol != VAL:
            split = index_by(self.read_questions(path), "question_id", path)
            check_ids(names, split, self.question_file(), path)
            return ({} for _ in rows)
        keys = ("question_id", "answers")
        known = index_by(_listed(path, "annotations", keys, self.name), "question_id", path)
        check_ids(names, known, self.question_file(), path)
        return ({"answers": _people(known[name], path)} for name in names)

    def item_score(self, item: Item, answer: str) -> float | None:
        if self.protocol != VAL:
            return None
        return vqav2_accuracy(normalise(answer), item.data["answers"])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`accuracy` on val; nothing on test-dev, whose answers only the server knows."""
        if self.protocol != VAL:
            return {}
        scores = [
            vqav2_accuracy(normalise(answer), item.data["answers"])
            for item, answer in zip(items, answers, strict=True)
        ]
        return {"accuracy": metric_of(scores, [item.images for item in items])}

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The server's file: test-dev with "" for the rest of test, or the questions of val."""
        results = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        split: Sequence[Row] = [{"question_id": name} for name in results]
        if self.protocol != VAL:
            split = self.read_questions(self.annotation_files()[0])
        path = folder / f"vqav2_{self.protocol}_submission.json"
        return [write_json(path, submission(split, results))]


def _listed(path: Path, name: str, keys: Sequence[str], task: str) -> list[Row]:
    """The objects under `name` of one of VQA's JSON files, each with `keys`."""
    content = read_json(path, task)
    rows = content.get(name) if isinstance(content, dict) else None
    if not rows:
        raise TaskError(f"{path} holds no list of {name}; it is no file of VQA v2")
    return check_listed(rows, name.removesuffix("s"), path, keys)


def _people(annotation: Row, path: Path) -> list[str]:
    """What each person answered. Raises TaskError where nobody's answer is there."""
    try:
        answers = [row["answer"] for row in annotation["answers"]]
    except (KeyError, TypeError):
        answers = []
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise TaskError(f"question {annotation['question_id']!r} of {path} has no answers in it")
    return answers
