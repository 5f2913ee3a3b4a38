"""Reading benchmark files: what is taken, and the one clear error for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava.eval.tasks.files import (
    ImageFolder,
    Kind,
    check_ids,
    hash_files,
    index_by,
    read_json,
    read_jsonl,
)
from llava.eval.tasks.question_file import TaskError
from llava.utils import UserInputError


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}', encoding="utf-8")
    assert read_jsonl(path) == [{"text": "a\u2028b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question_id": 1}\n{"question_id"', "line 2 of .* is damaged"),
        (b'{"question_id": "\xff"}', "line 1 of .* is damaged"),
        (b"[1]\n", "line 1 of .* is not a JSON object"),
        (b'{"image": "a.png"}\n', "line 1 of .* lacks question_id"),
    ],
)
def test_damaged_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_jsonl(path, fields={"question_id": Kind.ANY})


def test_a_missing_file_names_itself_and_the_command(tmp_path: Path) -> None:
    path = tmp_path / "gone.json"
    for read in (read_json, read_jsonl):
        with pytest.raises(TaskError, match=r"gone\.json.*python -m llava\.eval prepare gqa"):
            read(path, task="gqa")


def test_damaged_json(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('{"1": ')
    with pytest.raises(TaskError, match=r"cut\.json is damaged"):
        read_json(path)


def test_ids(tmp_path: Path) -> None:
    rows = [{"question_id": 1}, {"question_id": 2}, {"question_id": 1}]
    with pytest.raises(TaskError, match=r"rows\.jsonl has question_id 1 twice"):
        index_by(rows, "question_id", tmp_path / "rows.jsonl")
    assert list(index_by(rows[:2], "question_id", tmp_path)) == [1, 2]
    with pytest.raises(TaskError, match=r"has 2 question ids.* first is 3"):
        check_ids([1, 3, 4], [1, 2], tmp_path / "a", tmp_path / "b")
    check_ids([1], [1, 2], tmp_path / "a", tmp_path / "b")


def test_hash_sees_contents_order_and_image_sizes(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("a")
    two.write_text("b")
    hashes = {
        hash_files([one, two]),
        hash_files([two, one]),
        hash_files([one, two], [("x.png", 3)]),
        hash_files([one, two], [("x.png", 4)]),
    }
    assert len(hashes) == 4


def test_images(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "images", "pope")
    with pytest.raises(TaskError, match=r"no image folder .*prepare pope"):
        folder.load("a.png")
    folder.root.mkdir()
    Image.new("L", (4, 3)).save(folder.root / "a.png")
    (folder.root / "bad.png").write_text("no picture")
    assert folder.load("a.png").mode == "RGB"
    for name in ("bad.png", "gone.png"):
        with pytest.raises(UserInputError, match=name):
            folder.load(name)
    sizes = dict(folder.sizes(["gone.png", "a.png", "a.png"]))
    assert sizes["gone.png"] == -1
    assert sizes["a.png"] > 0
