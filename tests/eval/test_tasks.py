"""Question files: what is read, what is refused, and that drawn images are the recorded ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.eval.tasks.question_file import TaskError, load_task, other_images
from llava.world import FAMILIES

BENCHMARK = Path(__file__).resolve().parents[2] / "playground" / "llava-tiny" / "benchmark"


def test_the_benchmark_in_the_repository() -> None:
    task = load_task(BENCHMARK)
    assert len(task.questions) >= 2000
    assert len({question.image for question in task.questions}) >= 600
    families = {question.family for question in task.questions}
    assert families == set(FAMILIES)
    assert len({question.question_id for question in task.questions}) == len(task.questions)
    assert all("<image>" not in question.text for question in task.questions)


def test_drawn_images_are_held_against_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    shutil.copytree(BENCHMARK, folder)
    name = load_task(folder, limit=1).questions[0].image
    assert load_task(folder, limit=1).load_image(name).size == (336, 336)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TaskError, match="hash"):
        load_task(folder, limit=1).load_image(name)


def test_limit_takes_the_first_lines_and_groups_by_image(benchmark_folder: Path) -> None:
    task = load_task(benchmark_folder, limit=6, image_folder=benchmark_folder / "images")
    assert sorted(question.index for question in task.questions) == list(range(6))
    images = [question.image for question in task.questions]
    assert images == ["0.png", "0.png", "1.png", "1.png", "2.png", "3.png"]
    stand_ins = other_images(task.questions)
    assert stand_ins == {"0.png": "1.png", "1.png": "2.png", "2.png": "3.png", "3.png": "0.png"}


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ("", "", "no question"),
        ('{"question_id": 1, "image": "a.png", "text": "?"}\n', "", "no answer to question 1"),
        ('{"question_id": 1,', "", "not JSON lines"),
    ],
)
def test_unusable_files(tmp_path: Path, questions: str, answers: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "answers.jsonl").write_text(answers)
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path, image_folder=tmp_path)
