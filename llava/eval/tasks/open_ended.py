"""Benchmarks of long answers, which a GPT grades elsewhere: MM-Vet and LLaVA-Bench.

Here are the questions, and the files that their graders read. There is no metric.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import Row, as_json
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, answer_lines, question_line
from llava.storage import dump_lines

MMVET_ROWS = Dataset("lmms-lab/MMVet", "question_id question image")
LLAVA_BENCH_ROWS = Dataset(
    "lmms-lab/llava-bench-in-the-wild", "question_id question category image_id image", "train"
)


class GradedElsewhere(PublishedQuestions):
    """Prompts without a suffix, long answers, no metric."""

    max_new_tokens = 1024
    headline = ""

    def bare(self, text: str) -> str:
        return text.strip()


def mmvet_submission(answers: Iterable[tuple[str | int, str]]) -> str:
    """Return the JSON text `{"v1_<question id>": answer}`."""
    return json.dumps({f"v1_{name}": text for name, text in answers}, indent=2)


@register_benchmark
class MMVet(GradedElsewhere):
    """Graded by MM-Vet's GPT-4 script or its server."""

    name = "mmvet"
    title = "MM-Vet"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "answers only; MM-Vet's grader scores them"}
    image_path = "mm-vet/images"
    question_path = "mm-vet/llava-mm-vet.jsonl"
    submission_file = "mmvet_submission.json"

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return `{"v1_<id>": answer}`."""
        return mmvet_submission(zip((item.question_id for item in items), answers, strict=True))

    def sources(self) -> Sources:
        return self.published(218, f"{ARCHIVE}, and mm-vet.zip", build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        prompts = []
        for row in read(MMVET_ROWS):
            image, number = f"{row['question_id']}.png", row["question_id"].removeprefix("v1_")
            layout.image(self.image_folder() / image, row["image"])
            prompts.append(question_line(int(number), image, row["question"]))
        layout.lines(self.question_file(), prompts)


@register_benchmark
class LLaVABench(GradedElsewhere):
    """LLaVA-Bench (in the wild), graded by GPT-4 against its reference answers."""

    name = "llava-bench"
    title = "LLaVA-Bench"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "answers only; a GPT-4 review scores them"}
    image_path = "llava-bench-in-the-wild/images"
    question_path = "llava-bench-in-the-wild/questions.jsonl"
    submission_file = "llava_bench_answers.jsonl"

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            category = row.get("category")
            if category is not None and not isinstance(category, str):
                raise TaskError(
                    f"category of question {row['question_id']!r} of {self.question_file()} must "
                    f"be text, not {as_json(category)}"
                )
            yield {"category": category}

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the answer file that LLaVA's reviews read, in question order."""
        return dump_lines(answer_lines(items, answers))

    def sources(self) -> Sources:
        return self.published(60, "the folder llava-bench-in-the-wild", build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        prompts = []
        for row in read(LLAVA_BENCH_ROWS):
            image, name = Path(str(row["image_id"])).stem + ".jpg", row["question_id"]
            layout.image(self.image_folder() / image, row["image"])
            prompts.append(question_line(name, image, row["question"], row["category"]))
        layout.lines(self.question_file(), prompts)
