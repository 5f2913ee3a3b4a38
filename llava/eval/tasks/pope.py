"""POPE: three splits of "Is there a ... in the image?" about 500 COCO images.

The score is the F1 of the answer yes, as POPE and as lmms-eval count it. Sources: POPE (Li et al.,
2023) in LLaVA's evaluation code; the `pope` task of lmms-eval.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.stats import clustered_se, metric_of
from llava.eval.tasks.base import Item, Metric, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import Kind, Row, read_jsonl
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions

ROWS = Dataset("lmms-lab/POPE", "image_source image")
SPLITS = ("adversarial", "popular", "random")
_NEGATIONS = frozenset({"No", "not", "no"})

Answer = Literal["yes", "no"]
_WORDS: dict[str, Answer] = {"yes": "yes", "no": "no"}


@dataclass(frozen=True)
class Confusion:
    """Counts of answers against labels, "yes" being positive."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def accuracy(self) -> float:
        return (self.tp + self.tn) / (self.tp + self.tn + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """ZeroDivisionError, as in the published code, where no answer is yes."""
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self) -> float:
        """ZeroDivisionError, as in the published code, where no label is yes."""
        return self.tp / (self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 2 tp / (2 tp + fp + fn).

        0 where nothing is found (tp = 0), also where precision is undefined: a model that always
        says no has found nothing, and a table must be able to say so.
        """
        if self.tp == 0:
            return 0.0
        return 2 * self.precision * self.recall / (self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return (self.tp + self.fp) / (self.tp + self.tn + self.fp + self.fn)


def decide(text: str) -> Answer:
    """Read a free answer as POPE does: no if its first sentence negates, else yes.

    Only the words `No`, `no` and `not` negate, separated by spaces and cleared of commas: "NO",
    "Nothing" and the empty answer count as yes.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "yes" if _NEGATIONS.isdisjoint(words) else "no"


def decide_exactly(text: str) -> Answer | None:
    """Read yes or no as lmms-eval does: the whole answer, in any case; None for other text."""
    return _WORDS.get(text.strip().lower())


def count(answers: Sequence[Answer | None], labels: Sequence[Answer]) -> Confusion:
    """Count `answers` [n] against `labels` [n], paired by position.

    None is neither yes nor no and in no count, as in lmms-eval.

    Raises:
        ValueError: the lengths differ. The published code cuts the longer list, which is how 3,000
            labels came to be scored against 2,910 answers.
    """
    pairs = list(zip(answers, labels, strict=True))
    return Confusion(
        tp=pairs.count(("yes", "yes")),
        fp=pairs.count(("yes", "no")),
        tn=pairs.count(("no", "no")),
        fn=pairs.count(("no", "yes")),
    )


def f1_influences(answers: Sequence[Answer | None], labels: Sequence[Answer]) -> list[float]:
    """Return the influence of each answer [n] on `count(answers, labels).f1`, see `clustered_se`.

    F1 is the ratio 2 tp / (2 tp + fp + fn). All zero where that has no denominator.
    """
    pairs = list(zip(answers, labels, strict=True))
    hits = [2.0 * (pair == ("yes", "yes")) for pair in pairs]
    misses = [float(pair in (("yes", "no"), ("no", "yes"))) for pair in pairs]
    if not any(hits) and not any(misses):
        return [0.0] * len(pairs)
    return ratio_influences(hits, [a + b for a, b in zip(hits, misses, strict=True)])


def ratio_influences(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the influence [n] of each answer on sum(`numerators`) / sum(`denominators`)."""
    total = math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    return [(a - ratio * b) / total for a, b in zip(numerators, denominators, strict=True)]


def score(
    texts: Sequence[str],
    labels: Sequence[Answer],
    splits: Sequence[str],
    images: Sequence[Hashable],
) -> dict[str, Metric]:
    """Return all figures of POPE, in percent, from answers [n] and what they are about.

    * `mean_f1`: mean over the splits of their F1 by `decide`, LLaVA's figure. A split without
      questions (a limited run) is left out of the mean.
    * `random_f1`, `popular_f1`, `adversarial_f1`.
    * `pooled_f1`, `pooled_accuracy`: over all questions at once by `decide_exactly`, lmms-eval's.

    Standard errors: delta method, clustered by image. The three splits ask about the same images,
    which the error of `mean_f1` takes into account.
    """
    answers = [decide(text) for text in texts]
    present = [name for name in SPLITS if name in splits]
    metrics: dict[str, Metric] = {}
    mean_influences = [0.0] * len(texts)
    for name in present:
        rows = [row for row, split in enumerate(splits) if split == name]
        part = [answers[row] for row in rows], [labels[row] for row in rows]
        influences = f1_influences(*part)
        about = [images[row] for row in rows]
        metrics[f"{name}_f1"] = _percent(count(*part).f1, influences, about)
        for row, influence in zip(rows, influences, strict=True):
            mean_influences[row] = influence / len(present)
    mean = math.fsum(metrics[f"{name}_f1"].value for name in present) / len(present) / 100
    exact = [decide_exactly(text) for text in texts]
    right = [float(pair[0] == pair[1]) for pair in zip(exact, labels, strict=True)]
    return {
        "mean_f1": _percent(mean, mean_influences, images),
        **metrics,
        "pooled_f1": _percent(count(exact, labels).f1, f1_influences(exact, labels), images),
        "pooled_accuracy": metric_of(right, images),
    }


def _percent(value: float, influences: Sequence[float], images: Sequence[Hashable]) -> Metric:
    se = clustered_se(influences, images)
    return Metric(100 * value, None if se is None else 100 * se, len(influences))


@register_benchmark
class POPE(PublishedQuestions):
    """Mean F1 of the splits, and F1 and accuracy over all questions as lmms-eval has them."""

    name = "pope"
    title = "POPE"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "random (2,910 questions), popular, adversarial"
    }
    headline = "mean_f1"
    image_path = "pope/val2014"
    question_path = "pope/llava_pope_test.jsonl"
    annotation_paths = tuple(f"pope/coco/coco_pope_{split}.json" for split in SPLITS)

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        """Pair labels by their order in the split: they carry other ids than questions."""
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

    def sources(self) -> Sources:
        return self.published(
            8_910,
            f"{ARCHIVE}, POPE's output/coco (the revision whose random file has 2,910 lines), and "
            "COCO's val2014.zip",
            build=self.build,
            images_only=True,
        )

    def build(self, read: Read, layout: Layout) -> None:
        """Take images only: the random split has 3,000 questions there, LLaVA's 2,910 of them."""
        for row in read(ROWS):
            layout.image(self.image_folder() / f"{row['image_source']}.jpg", row["image"])

    def _labels(self, path: Path, images: Sequence[str]) -> list[str]:
        """Read the labels in `path`, which must be about `images`, in that order."""
        rows = read_jsonl(path, self.name, fields={"image": Kind.ANY, "label": Kind.ANY})
        if len(rows) != len(images):
            raise TaskError(
                f"{path} has {len(rows)} labels for {len(images)} questions of "
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
