"""POPE: three splits of "Is there a ... in the image?" about 500 COCO images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.scorers.pope import SPLITS, decide, score
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import read_jsonl
from llava.eval.tasks.published import PublishedQuestions, Row


@register_benchmark
class POPE(PublishedQuestions):
    """Mean F1 of the splits, and F1 and accuracy over all questions as lmms-eval has them."""

    name = "pope"
    title = "POPE"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "random (2,910 questions), popular, adversarial"
    }
    headline = "mean_f1"

    def image_folder(self) -> Path:
        return self.root / "pope/val2014"

    def question_file(self) -> Path:
        return self.root / "pope/llava_pope_test.jsonl"

    def annotation_files(self) -> list[Path]:
        return [self.root / f"pope/coco/coco_pope_{split}.json" for split in SPLITS]

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        """Labels carry other ids than questions: they are paired by their order in the split."""
        images = defaultdict(list)
        for row in rows:
            if row.get("category") not in SPLITS:
                raise TaskError(
                    f"question {row['question_id']!r} of {self.question_file()} has the category "
                    f"{row.get('category')!r}; one of {', '.join(SPLITS)}"
                )
            images[row["category"]].append(row["image"])
        labels = {
            split: iter(self._labels(path, images[split]))
            for split, path in zip(SPLITS, self.annotation_files(), strict=True)
        }
        return (
            {"category": row["category"], "label": next(labels[row["category"]])} for row in rows
        )

    def item_score(self, item: Item, answer: str) -> float:
        return float(decide(answer) == item.data["label"])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        return score(
            answers,
            [item.data["label"] for item in items],
            [item.data["category"] for item in items],
            [item.images for item in items],
        )

    def _labels(self, path: Path, images: Sequence[str]) -> list[str]:
        """The labels in `path`, which must be about `images`, in that order."""
        rows = read_jsonl(path, self.name, keys=("image", "label"))
        if len(rows) != len(images):
            raise TaskError(
                f"{path} holds {len(rows)} labels for {len(images)} questions of "
                f"{self.question_file()}; LLaVA's questions need the revision of POPE whose random "
                f"split has 2,910 lines: python -m llava.eval prepare {self.name}"
            )
        for number, (row, image) in enumerate(zip(rows, images, strict=True), start=1):
            if row["image"] != image:
                raise TaskError(
                    f"line {number} of {path} is about {row['image']}, but question {number} of "
                    f"its split is about {image}; the files are not of one revision"
                )
            if row["label"] not in ("yes", "no"):
                raise TaskError(f"line {number} of {path} is labelled {row['label']!r}")
        return [row["label"] for row in rows]
