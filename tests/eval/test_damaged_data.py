"""Benchmarks on JSON files that hold something else: one clear error before anything runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.eval.demo import write_playground
from llava.eval.tasks.base import TaskError, get_benchmark

FIRST = 0  # the first key of an object, or element of a list
CASES: list[tuple[str, str, tuple[Any, ...], Any, str]] = [
    ("gqa", "gqa/data/testdev_balanced_questions.json", (FIRST, "imageId"), [], "must be text"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", (FIRST, "types"), 5, "structural type"),
    ("gqa", "gqa/data/testdev_balanced_questions.json", (FIRST, "types"), {}, "structural type"),
    (
        "vqav2",
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        ("questions", FIRST, "image_id"),
        "zz",
        "its image_id must be a number",
    ),
    (
        "vqav2",
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        ("questions", FIRST, "question"),
        5,
        "question in question 1 of .* must be text",
    ),
    (
        "vqav2",
        "vqav2/v2_mscoco_val2014_annotations.json",
        ("annotations", FIRST, "answers", FIRST, "answer"),
        5,
        "has no answers in it",
    ),
    ("scienceqa", "scienceqa/llava_test_CQM-A.json", (FIRST, "image"), 5, "must be a file name"),
    (
        "scienceqa",
        "scienceqa/llava_test_CQM-A.json",
        (FIRST, "id"),
        [1],
        "must be text or a whole number",
    ),
    ("seed", "seed_bench/SEED-Bench.json", ("questions", FIRST, "answer"), [], "must be text"),
    ("mmmu", "mmmu/validation.jsonl", (FIRST, "answer"), [], "has no answer"),
]


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_playground(tmp_path_factory.mktemp("damaged") / "playground", 6)


@pytest.mark.parametrize(("task", "file", "place", "value", "message"), CASES)
def test_a_value_of_another_kind_is_named(
    playground: Path,
    tmp_path: Path,
    task: str,
    file: str,
    place: tuple[Any, ...],
    value: Any,
    message: str,
) -> None:
    root = tmp_path / "data"
    shutil.copytree(playground, root)
    get_benchmark(task)(root).items()  # nothing is wrong yet
    text = (root / file).read_text()
    lines = file.endswith(".jsonl")
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    holder = content
    for step in place[:-1]:
        holder = holder[next(iter(holder)) if step == FIRST and isinstance(holder, dict) else step]
    holder[place[-1]] = value
    rows = content if lines else [content]
    (root / file).write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(TaskError) as caught:
        get_benchmark(task)(root).items()
    assert re.search(message, str(caught.value)) and Path(file).name in str(caught.value)
