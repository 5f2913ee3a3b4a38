"""Benchmarks of long answers, which a GPT grades elsewhere: MM-Vet and LLaVA-Bench.

Here are the questions, and the files that their graders read. There is no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.converters.mmvet import submission
from llava.eval.tasks.base import Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import shown
from llava.eval.tasks.published import PublishedQuestions, Row
from llava.storage import dump_lines, write_atomically


class GradedElsewhere(PublishedQuestions):
    """Prompts without a suffix, long answers, no metric."""

    max_new_tokens = 1024
    headline = ""

    def bare(self, text: str) -> str:
        return text.strip()

    def item_score(self, item: Item, answer: str) -> None:
        return None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        return {}


@register_benchmark
class MMVet(GradedElsewhere):
    """Graded by MM-Vet's GPT-4 script or its server."""

    name = "mmvet"
    title = "MM-Vet"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "answers only; MM-Vet's grader scores them"}

    def image_folder(self) -> Path:
        return self.root / "mm-vet/images"

    def question_file(self) -> Path:
        return self.root / "mm-vet/llava-mm-vet.jsonl"

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """`{"v1_<id>": answer}`."""
        path = folder / "mmvet_submission.json"
        given = zip((item.question_id for item in items), answers, strict=True)
        write_atomically(path, submission(given))
        return [path]


@register_benchmark
class LLaVABench(GradedElsewhere):
    """LLaVA-Bench (in the wild), graded by GPT-4 against its reference answers."""

    name = "llava-bench"
    title = "LLaVA-Bench"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "answers only; a GPT-4 review scores them"}

    def image_folder(self) -> Path:
        return self.root / "llava-bench-in-the-wild/images"

    def question_file(self) -> Path:
        return self.root / "llava-bench-in-the-wild/questions.jsonl"

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            if row.get("category") is not None and not isinstance(row["category"], str):
                raise TaskError(
                    f"category of question {row['question_id']!r} of {self.question_file()} is no "
                    f"text but {shown(row['category'])}"
                )
            yield {"category": row.get("category")}

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The answer file that LLaVA's reviews read, in question order."""
        path = folder / "llava_bench_answers.jsonl"
        rows = [
            {"question_id": item.question_id, "prompt": item.text, "text": answer}
            for item, answer in zip(items, answers, strict=True)
        ]
        write_atomically(path, dump_lines(rows))
        return [path]
