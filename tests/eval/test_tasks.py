"""Question files: what is read, what is refused, and that drawn images are the recorded ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.eval.engine.batches import Plan, chunk_of, group_by_image, other_images
from llava.eval.tasks.base import Item, TaskError, get_benchmark
from llava.eval.tasks.question_file import QuestionFile
from llava.utils import UserInputError
from llava.world import FAMILIES

BENCHMARK = Path(__file__).resolve().parents[2] / "playground" / "llava-tiny" / "benchmark"


def test_the_benchmark_in_the_repository() -> None:
    items = QuestionFile(BENCHMARK).items()
    assert len(items) >= 2000
    assert len({item.images for item in items}) >= 600
    assert {item.data["category"] for item in items} == set(FAMILIES)
    assert len({item.question_id for item in items}) == len(items)
    assert all("<image>" not in item.text for item in items)


def test_drawn_images_are_held_against_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    shutil.copytree(BENCHMARK, folder)
    name = QuestionFile(folder).items()[0].images[0]
    assert QuestionFile(folder).load_image(name).size == (336, 336)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TaskError, match="hash"):
        QuestionFile(folder).load_image(name)


def test_batches_hold_questions_about_one_image_together(benchmark_folder: Path) -> None:
    plan = Plan.of(QuestionFile(benchmark_folder).items()[:6], batch_size=4)
    assert [item.index for item in plan.items] == list(range(6))
    assert [len(batch) for batch in plan.batches] == [4, 2]
    images = [item.images for batch in plan.batches for item in batch]
    assert images == [("0.png",), ("0.png",), ("1.png",), ("1.png",), ("2.png",), ("3.png",)]
    stand_ins = other_images(plan.images())
    assert stand_ins == {"0.png": "1.png", "1.png": "2.png", "2.png": "3.png", "3.png": "0.png"}


def test_items_without_images_form_no_group() -> None:
    def item(index: int, *images: str) -> Item:
        return Item(index, index, images, "?", "?")

    grouped = group_by_image([item(0, "a"), item(1), item(2, "a", "b"), item(3), item(4, "a")])
    assert [item.index for item in grouped] == [0, 4, 1, 2, 3]


def test_chunks_are_consecutive_and_the_last_may_be_empty(benchmark_folder: Path) -> None:
    items = QuestionFile(benchmark_folder).items()  # 9 of them
    sizes = [len(chunk_of(items, 4, number)) for number in range(4)]
    assert sizes == [3, 3, 3, 0]
    assert [i for n in range(4) for i in chunk_of(items, 4, n)] == items
    for count, number in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(UserInputError, match="--chunk-idx"):
            chunk_of(items, count, number)


def test_tasks_are_found_by_name() -> None:
    assert get_benchmark("llava-tiny") is QuestionFile
    with pytest.raises(TaskError, match="did you mean 'llava-tiny'"):
        get_benchmark("lava-tiny")


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ("", "", "no questions"),
        ('{"question_id": 1, "image": "a.png", "text": "?"}\n', "", "no answer to question 1"),
        ('{"question_id": 1,', "", "is not JSON"),
        ('{"question_id": 1, "image": "a.png", "text": "?"}\n' * 2, "", "question_id '1' twice"),
        (
            '{"question_id": 1, "image": "a.png", "text": "?"}\n',
            '{"question_id": 1, "answer": "a"}\n{"question_id": 7, "answer": "b"}\n',
            "answers question 7",
        ),
    ],
)
def test_unusable_files(tmp_path: Path, questions: str, answers: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "answers.jsonl").write_text(answers)
    with pytest.raises(TaskError, match=message):
        QuestionFile(tmp_path).items()
