"""VQAv2: open questions about COCO images; val is scored here, test-dev on a server."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.rules.vqa import normalise, vqav2_accuracy
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import (
    SHORT_ANSWER,
    Fields,
    Kind,
    Row,
    check_ids,
    check_listed,
    index_by,
    read_json,
)
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, question_line

VAL = "val"
COLUMNS = "question_id image_id question image"
VAL_ROWS = Dataset("lmms-lab/VQAv2", f"{COLUMNS} answers question_type answer_type", "validation")
TEST_ROWS = Dataset("lmms-lab/VQAv2", COLUMNS, "test")
TEST_DEV_ROWS = Dataset("lmms-lab/VQAv2", COLUMNS, "testdev")
QUESTION = {"question_id": Kind.ID, "image_id": Kind.ID, "question": Kind.TEXT}
ANNOTATION = {"question_id": Kind.ID, "answers": Kind.ANY}
_NUMBER = re.compile(r"[0-9]{1,12}")  # of an image, as COCO's file names have room for


def submission(split: Iterable[Row], results: Mapping[Any, str]) -> list[Row]:
    """Return [{question_id, answer}] for every question of `split`, "" where there is no result."""
    names = [row["question_id"] for row in split]
    return [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]


@register_benchmark
class VQAv2(PublishedQuestions):
    """VQA accuracy of EvalAI-normalised answers, the error clustered by image.

    On test-dev there is no score: only the server knows the answers.
    """

    name = "vqav2"
    title = "VQAv2"
    protocols: ClassVar[Mapping[str, str]] = {
        VAL: "val2014, scored locally; not comparable with published test-dev figures",
        "test-dev": "test-dev2015, a submission file for the server",
    }

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        super().__init__(root, protocol)
        self.submission_file = f"vqav2_{self.protocol}_submission.json"

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
        """Read val from VQA's own question file: LLaVA publishes none."""
        if self.protocol != VAL:
            return super().rows()
        path = self.question_file()
        questions = _listed(path, "questions", QUESTION, self.name)
        index_by(questions, "question_id", path)
        for row in questions:
            if not _NUMBER.fullmatch(str(row["image_id"])):
                raise TaskError(
                    f"question {row['question_id']!r} of {path} is damaged: its image_id must be "
                    "a number"
                )
        return [
            {
                "question_id": row["question_id"],
                "image": _image_name("val2014", row["image_id"]),
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
        annotations = _listed(path, "annotations", ANNOTATION, self.name)
        known = index_by(annotations, "question_id", path)
        check_ids(names, known, self.question_file(), path)
        return ({"answers": _people(known[name], path)} for name in names)

    def item_score(self, item: Item, answer: str) -> float | None:
        if self.protocol != VAL:
            return None
        return vqav2_accuracy(normalise(answer), item.data["answers"])

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the server's file: test-dev with "" for the rest of test, or questions of val."""
        results = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        split: Sequence[Row] = [{"question_id": name} for name in results]
        if self.protocol != VAL:
            split = self.read_questions(self.annotation_files()[0])
        return json.dumps(submission(split, results))

    def sources(self) -> Sources:
        if self.protocol == VAL:
            originals = "VQA v2's questions and annotations of val, and COCO's val2014.zip"
            return self.published(214_354, originals, build=self.build_val)
        originals = f"{ARCHIVE}, and COCO's test2015.zip"
        return self.published(107_394, originals, build=self.build_test)

    def build_val(self, read: Read, layout: Layout) -> None:
        """Make VQA's own two files: LLaVA has none for this split."""
        questions, annotations = [], []
        for row in read(VAL_ROWS):
            name = _image_name("val2014", row["image_id"])
            layout.image(self.image_folder() / name, row["image"])
            keys = ("question_id", "image_id", "answers", "question_type", "answer_type")
            questions.append({key: row[key] for key in ("question_id", "image_id", "question")})
            annotations.append({key: row[key] for key in keys})
        layout.json(self.annotation_files()[0], {"annotations": annotations})
        layout.json(self.question_file(), {"questions": questions})

    def build_test(self, read: Read, layout: Layout) -> None:
        """Make the whole test split, then test-dev."""
        files = {self.annotation_files()[0]: TEST_ROWS, self.question_file(): TEST_DEV_ROWS}
        for file, dataset in files.items():
            prompts = []
            for row in read(dataset):
                image = _image_name("test2015", row["image_id"])
                layout.image(self.image_folder() / image, row["image"])
                text = row["question"] + SHORT_ANSWER
                prompts.append(question_line(row["question_id"], image, text))
            layout.lines(file, prompts)


def _image_name(split: str, number: int | str) -> str:
    return f"COCO_{split}_{int(number):012d}.jpg"


def _listed(path: Path, name: str, fields: Fields, task: str) -> list[Row]:
    """Return the objects under `name` of one of VQA's JSON files, each with `fields`."""
    content = read_json(path, task)
    rows = content.get(name) if isinstance(content, dict) else None
    if not rows:
        raise TaskError(f"{path} has no list of {name}; is it a file of VQA v2?")
    return check_listed(rows, name.removesuffix("s"), path, fields)


def _people(annotation: Row, path: Path) -> list[str]:
    """Return what each person answered.

    Raises:
        TaskError: there is no answer.
    """
    try:
        answers = [row["answer"] for row in annotation["answers"]]
    except (KeyError, TypeError):
        answers = []
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise TaskError(f"question {annotation['question_id']!r} of {path} has no answers in it")
    return answers
