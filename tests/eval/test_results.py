"""Logs survive whatever a killed process leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.eval.results import (
    ResultError,
    RunFolder,
    complete_batches,
    exclusive,
    read_result,
    write_atomically,
)

SIZES = [2, 2, 1]


def lines(batch: int, text: str = "\u2028 é") -> list[dict]:
    return [{"batch": batch, "answer": f"{text}{i}"} for i in range(SIZES[batch])]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run", SIZES)
    for batch in range(3):
        folder.append(lines(batch), [{"batch": batch, "ms": 1.0}])
    return tmp_path / "run"


def test_a_finished_log_is_kept_as_it_is(full: Path) -> None:
    before = (full / "answers.jsonl").read_bytes()
    folder = RunFolder(full, SIZES)
    assert folder.done == 3
    assert folder.answers == [line for batch in range(3) for line in lines(batch)]
    assert (full / "answers.jsonl").read_bytes() == before


def test_every_cut_resumes_to_the_same_bytes(full: Path) -> None:
    """Cut the log anywhere: the rest is answered again, byte for byte."""
    whole = (full / "answers.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, len(whole), *ends, *(end - 1 for end in ends), *range(0, len(whole), 9)}):
        (full / "answers.jsonl").write_bytes(whole[:cut])
        folder = RunFolder(full, SIZES)
        present = sum(end <= cut for end in ends)
        assert folder.done == (0 if present < 2 else 1 if present < 4 else 2 if present < 5 else 3)
        assert [line["batch"] for line in folder.timings] == list(range(folder.done))
        for batch in range(folder.done, 3):
            folder.append(lines(batch), [{"batch": batch, "ms": 2.0}])
        assert (full / "answers.jsonl").read_bytes() == whole
        assert len((full / "timings.jsonl").read_text().splitlines()) == 3


def test_damage_in_the_middle_drops_what_follows(full: Path) -> None:
    path = full / "answers.jsonl"
    rows = path.read_bytes().split(b"\n")
    rows[2] = b'{"batch": 1, "answ'
    path.write_bytes(b"\n".join(rows))
    assert RunFolder(full, SIZES).done == 1


def test_batches_must_follow_the_plan() -> None:
    assert complete_batches([{"batch": 0}, {"batch": 0}, {"batch": 2}], [2, 1, 1]) == 1
    assert complete_batches([{"batch": 0}], [2]) == 0


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(ResultError, match="another process"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_writing_leaves_no_other_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "a.json", "1")
    write_atomically(tmp_path / "new" / "a.json", "2")
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.json", "2")]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema_version": 0}'])
def test_other_files_are_no_results(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ResultError, match=r"r\.json"):
        read_result(tmp_path / "r.json")
