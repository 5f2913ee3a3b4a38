"""POPE: is an object in the image? F1 of the answer yes, as POPE and as lmms-eval count it.

Sources: POPE (Li et al., 2023) in LLaVA's evaluation code; the `pope` task of lmms-eval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from llava.eval.scorers.uncertainty import clustered_se, ratio_influences
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Metric

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
    """POPE's reading of a free answer: no if its first sentence negates, else yes.

    Only the words `No`, `no` and `not` negate, separated by spaces and cleared of commas: "NO",
    "Nothing" and the empty answer count as yes.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "yes" if _NEGATIONS.isdisjoint(words) else "no"


def decide_exactly(text: str) -> Answer | None:
    """lmms-eval's reading: the whole answer is yes or no, whatever its case; None otherwise."""
    return _WORDS.get(text.strip().lower())


def count(answers: Sequence[Answer | None], labels: Sequence[Answer]) -> Confusion:
    """Confusion of `answers` [n] with `labels` [n], paired by position.

    None is neither yes nor no and in no count, as in lmms-eval. Raises ValueError if the lengths
    differ: the published code cuts the longer list, which is how 3,000 labels came to be scored
    against 2,910 answers.
    """
    pairs = list(zip(answers, labels, strict=True))
    return Confusion(
        tp=pairs.count(("yes", "yes")),
        fp=pairs.count(("yes", "no")),
        tn=pairs.count(("no", "no")),
        fn=pairs.count(("no", "yes")),
    )


def f1_influences(answers: Sequence[Answer | None], labels: Sequence[Answer]) -> list[float]:
    """Influence of each answer [n] on `count(answers, labels).f1`, see `uncertainty`.

    F1 is the ratio 2 tp / (2 tp + fp + fn). All zero where that has no denominator.
    """
    pairs = list(zip(answers, labels, strict=True))
    hits = [2.0 * (pair == ("yes", "yes")) for pair in pairs]
    misses = [float(pair in (("yes", "no"), ("no", "yes"))) for pair in pairs]
    if not any(hits) and not any(misses):
        return [0.0] * len(pairs)
    return ratio_influences(hits, [a + b for a, b in zip(hits, misses, strict=True)])


def score(
    texts: Sequence[str],
    labels: Sequence[Answer],
    splits: Sequence[str],
    images: Sequence[Hashable],
) -> dict[str, Metric]:
    """All figures of POPE, in percent, from answers [n] and what they are about.

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
