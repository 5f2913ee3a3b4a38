"""MME: 14 categories of yes/no questions, two about each image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.converters.mme import answer_files, mme_lines, read_truth, write_categories
from llava.eval.scorers import mme
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.published import PublishedQuestions, Row

RELEASE = "MME/MME_Benchmark_release_version"


@register_benchmark
class MME(PublishedQuestions):
    """Perception (of 2000) and cognition (of 800).

    The error of a category is that of the mean over its images; those of sums take categories as
    independent. Both questions about an image carry one question id.
    """

    name = "mme"
    title = "MME"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "single word or phrase, instead of yes or no"
    }
    headline = "perception"
    unique_ids = False

    def image_folder(self) -> Path:
        return self.root / RELEASE

    def question_file(self) -> Path:
        return self.root / "MME/llava_mme.jsonl"

    def annotation_files(self) -> list[Path]:
        return answer_files(self.root / RELEASE, self.name)

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        truth = read_truth(self.root / RELEASE, self.name)
        keys = [mme.question_key(str(row["question_id"]), row["text"], truth) for row in rows]
        pairs = defaultdict(list)
        for category, file, question in keys:
            pairs[category, file].append(question)
        for (category, file), questions in pairs.items():
            if category not in mme.PERCEPTION + mme.COGNITION:
                raise TaskError(f"{self.question_file()} asks for {category!r}, no category of MME")
            if len(questions) != 2:
                raise TaskError(
                    f"{self.question_file()} must ask two questions about "
                    f"{category}/{file.removesuffix('.txt')}, it asks {questions}"
                )
        return ({"key": list(key), "answer": truth[key]} for key in keys)

    def item_score(self, item: Item, answer: str) -> float:
        return float(mme.decide(answer) == item.data["answer"].lower())

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`perception`, `cognition`, `total`, and every category under its name.

        A limited run may end between the two questions of an image: that image does not count.
        The scale of a sum is that of the categories that are there.
        """
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for item, answer in zip(items, answers, strict=True):
            category, file, _ = item.data["key"]
            right[category][file].append(self.item_score(item, answer) == 1)
        complete = {
            category: [pair for pair in images.values() if len(pair) == 2]
            for category, images in right.items()
        }
        scores = {
            name: mme.category_score(complete[name])
            for name in mme.PERCEPTION + mme.COGNITION
            if complete.get(name)
        }
        groups = {
            "perception": [scores[name] for name in mme.PERCEPTION if name in scores],
            "cognition": [scores[name] for name in mme.COGNITION if name in scores],
            "total": list(scores.values()),
        }
        return {name: mme.total(group) for name, group in groups.items() if group} | scores

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """`mme/CATEGORY.txt`, what MME's calculation reads."""
        truth = {tuple(item.data["key"]): item.data["answer"] for item in items}
        rows = (
            {"question_id": item.question_id, "prompt": item.text, "text": answer}
            for item, answer in zip(items, answers, strict=True)
        )
        return write_categories(folder / "mme", mme_lines(rows, truth))
