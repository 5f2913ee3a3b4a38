"""ScienceQA: school questions with options; about half of them show an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.scorers.science_qa import judge
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Benchmark, Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    ImageFolder,
    check_fields,
    check_ids,
    check_listed,
    hash_files,
    image_names,
    index_by,
    read_json,
)
from llava.storage import dump_lines, write_atomically


@register_benchmark
class ScienceQA(Benchmark):
    """Every image belongs to one question, so standard errors need no clusters."""

    name = "scienceqa"
    title = "SQA-IMG"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "test split, the option's letter"}
    max_new_tokens = 1024
    headline = "image_accuracy"

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        super().__init__(root, protocol)
        self.folder = root / "scienceqa"
        self.images = ImageFolder(self.folder / "images" / "test", self.name)

    def items(self) -> list[Item]:
        return list(self._items)

    def load_image(self, name: str) -> Image.Image:
        return self.images.load(name, self.pixels)

    def data_hash(self) -> str:
        names = [name for item in self._items for name in item.images]
        files = (
            self._question_file,
            self.folder / "problems.json",
            self.folder / "pid_splits.json",
        )
        return hash_files(files, self.images.sizes(names))

    def item_score(self, item: Item, answer: str) -> float:
        return float(judge(answer, item.data["answer"], item.data["choices"]).correct)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`image_accuracy` over questions with an image (if any), `accuracy` over all."""
        scores = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        shown = [score for item, score in zip(items, scores, strict=True) if item.images]
        metrics = {"image_accuracy": shown, "accuracy": scores}
        return {name: metric_of(values) for name, values in metrics.items() if values}

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The answer file that `llava.eval.eval_science_qa` reads."""
        path = folder / "scienceqa_answers.jsonl"
        rows = [
            {
                "question_id": item.question_id,
                "prompt": "<image>\n" * bool(item.images) + item.text,
                "text": answer,
            }
            for item, answer in zip(items, answers, strict=True)
        ]
        write_atomically(path, dump_lines(rows))
        return [path]

    @property
    def _question_file(self) -> Path:
        return self.folder / "llava_test_CQM-A.json"

    @cached_property
    def _items(self) -> list[Item]:
        problems, _ = read_split(self.folder, "test", self.name)
        path = self._question_file
        rows = read_json(path, self.name)
        if not check_listed(rows, "question", path, keys=("id", "conversations")):
            raise TaskError(f"{path} holds no question")
        check_ids(index_by(rows, "id", path), problems, path, self.folder / "problems.json")
        return [self._item(*pair, problems) for pair in enumerate(rows)]

    def _item(self, index: int, row: dict[str, Any], problems: Mapping[str, Any]) -> Item:
        where = f"question {row['id']!r} of {self._question_file}"
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns:
            raise TaskError(
                f"{where} is damaged: `conversations` must start with a turn that has a `value`"
            )
        check_fields(turns[0], f"the first turn of {where}", texts=("value",))
        question = turns[0]["value"].replace("<image>", "").strip()
        images = image_names(row.get("image"), where)
        if len(images) > 1:
            raise TaskError(f"the image of {where} is no name of a file, but a list")
        problem = problems[row["id"]]
        return Item(
            index,
            row["id"],
            images,
            question + OPTION_LETTER,
            question,
            {"answer": problem["answer"], "choices": len(problem["choices"])},
        )


def read_split(
    folder: Path, split: str, task: str | None = None
) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """All problems of ScienceQA and the ids of one split. Raises TaskError for unusable files."""
    problems = read_json(folder / "problems.json", task)
    splits = read_json(folder / "pid_splits.json", task)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise TaskError(f"problems.json and pid_splits.json in {folder} must be JSON objects")
    if not splits.get(split):
        known = ", ".join(name for name in splits if splits[name])
        raise TaskError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {known}")
    names = splits[split]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskError(f"{folder / 'pid_splits.json'} must list the ids of {split!r} as texts")
    check_ids(names, problems, folder / "pid_splits.json", folder / "problems.json")
    for name in names:
        problem = problems[name] if isinstance(problems[name], dict) else {}
        answer, choices = problem.get("answer"), problem.get("choices")
        whole = isinstance(answer, int) and not isinstance(answer, bool)
        if not isinstance(choices, list) or not whole or answer not in range(len(choices)):
            raise TaskError(
                f"problem {name} in {folder / 'problems.json'} is damaged: `answer` must be the "
                "index of one of its `choices`"
            )
    return problems, names
