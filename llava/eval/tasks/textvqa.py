"""TextVQA, val 0.5.1: 5,000 questions whose answers are written in the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.scorers.textvqa import OCR_LINE, answers_by_question, answers_for
from llava.eval.scorers.vqa_accuracy import textvqa_accuracy
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, read_json
from llava.eval.tasks.published import PublishedQuestions, Row


@register_benchmark
class TextVQA(PublishedQuestions):
    """VQA accuracy of EvalAI-normalised answers, the error clustered by image.

    The question id is the image's, so it stands once for every question about the image.
    """

    name = "textvqa"
    title = "TextVQA"
    protocols: ClassVar[Mapping[str, str]] = {
        "ocr": "the prompt lists OCR tokens, as LLaVA-1.5 publishes its figures",
        "no-ocr": "the prompt is the question alone, as LLaVA-1.6 publishes its figures",
    }
    headline = "accuracy"
    unique_ids = False

    def image_folder(self) -> Path:
        return self.root / "textvqa/train_images"

    def question_file(self) -> Path:
        return self.root / "textvqa/llava_textvqa_val_v051_ocr.jsonl"

    def annotation_files(self) -> list[Path]:
        return [self.root / "textvqa/TextVQA_0.5.1_val.json"]

    def rows(self) -> list[Row]:
        """One question file serves both protocols: `no-ocr` leaves out its OCR lines."""
        rows = super().rows()
        if self.protocol == "ocr":
            return rows
        return [row | {"text": self.bare(row["text"]) + SHORT_ANSWER} for row in rows]

    def bare(self, text: str) -> str:
        lines = super().bare(text).split("\n")
        return "\n".join(line for line in lines if not line.startswith(OCR_LINE.rstrip()))

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        path = self.annotation_files()[0]
        content = read_json(path, self.name)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise TaskError(f"{path} holds no list of annotations under data")
        known = answers_by_question(content["data"], path)
        return ({"answers": answers_for(known, row["question_id"], row["text"])} for row in rows)

    def item_score(self, item: Item, answer: str) -> float:
        return textvqa_accuracy(answer, item.data["answers"])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        scores = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        return {"accuracy": metric_of(scores, [item.images for item in items])}
