"""Logs survive whatever a killed process leaves behind."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from llava.eval.engine.run_folder import RunFolder
from llava.eval.engine.schema import read_result
from llava.storage import StorageError, exclusive, write_atomically

SIZES = [2, 2, 1]


def lines(batch: int, text: str = "\u2028 é") -> list[dict]:
    first = sum(SIZES[:batch])
    return [
        {"batch": batch, "index": first + i, "answer": f"{text}{i}"} for i in range(SIZES[batch])
    ]


def everything() -> list[dict]:
    return [line for batch in range(3) for line in lines(batch)]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run", SIZES)
    for batch in range(3):
        folder.append(lines(batch), [{"batch": batch, "ms": 1.0}])
    folder.close()
    return tmp_path / "run"


def test_a_finished_log_is_kept_as_it_is(full: Path) -> None:
    before = (full / "log" / "answers-0.jsonl").read_bytes()
    folder = RunFolder(full, SIZES)
    assert folder.remaining() == []
    assert folder.read()[0] == everything()
    assert (full / "log" / "answers-0.jsonl").read_bytes() == before


def test_every_cut_resumes_to_the_same_bytes(full: Path) -> None:
    """Cut the log anywhere: the rest is answered again, byte for byte."""
    log = full / "log" / "answers-0.jsonl"
    whole = log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, len(whole), *ends, *(end - 1 for end in ends), *range(0, len(whole), 9)}):
        log.write_bytes(whole[:cut])
        folder = RunFolder(full, SIZES)
        present = sum(end <= cut for end in ends)
        done = 0 if present < 2 else 1 if present < 4 else 2 if present < 5 else 3
        assert folder.remaining() == list(range(done, 3))
        assert [line["batch"] for line in folder.read()[1]] == list(range(done))
        for batch in range(done, 3):
            folder.append(lines(batch), [{"batch": batch, "ms": 2.0}])
        folder.close()
        assert log.read_bytes() == whole
        assert len((full / "log" / "timings-0.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("damage", [b'{"batch": 1, "answ', b"[1]", b"\xff", b'{"batch": 9}'])
def test_damage_in_the_middle_drops_what_follows(full: Path, damage: bytes) -> None:
    path = full / "log" / "answers-0.jsonl"
    rows = path.read_bytes().split(b"\n")
    rows[2] = damage
    path.write_bytes(b"\n".join(rows))
    assert RunFolder(full, SIZES).remaining() == [1, 2]


def test_processes_share_a_run(tmp_path: Path) -> None:
    """Every process has a log; whatever their number is next time, no batch is lost."""
    one, two = (RunFolder(tmp_path, SIZES, rank) for rank in (0, 1))
    two.append(lines(1), [{"batch": 1, "ms": 1.0}])
    assert one.remaining() == two.remaining() == [0, 2]
    one.append(lines(0), [{"batch": 0, "ms": 1.0}])
    one.append(lines(1), [{"batch": 1, "ms": 9.0}])  # an orphan of another run may do the same
    two.append(lines(2), [{"batch": 2, "ms": 1.0}])
    one.close(), two.close()
    answers, timings = RunFolder(tmp_path, SIZES).read()
    assert answers == everything()
    assert [line["batch"] for line in timings] == [0, 1, 2]


def test_answers_are_sorted_by_index(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, [4, 2])
    first = [{"batch": 0, "index": i, "arm": arm} for arm in "ba" for i in (2, 0)]
    folder.append(first, [])
    folder.append([{"batch": 1, "index": 1, "arm": arm} for arm in "ba"], [])
    order = [(line["index"], line["arm"]) for line in folder.read()[0]]
    assert order == [(0, "b"), (0, "a"), (1, "b"), (1, "a"), (2, "b"), (2, "a")]


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; the write is torn in its middle."""
    folder = RunFolder(tmp_path, SIZES)
    folder.append(lines(0), [])
    log = tmp_path / "log" / "answers-0.jsonl"
    before = log.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(StorageError, match=r"answers-0\.jsonl.*make room"):
            folder.append(lines(1), [])
        with pytest.raises(StorageError, match=r"metrics\.json.*make room"):
            folder.write_json("metrics.json", {"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    folder.append(lines(1), [])
    assert folder.remaining() == [2]


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SIZES)
    with pytest.raises(StorageError, match="another process"):
        RunFolder(tmp_path, SIZES)
    folder.close()
    RunFolder(tmp_path, SIZES).close()


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(StorageError, match="another process"),
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
    with pytest.raises(StorageError, match=r"r\.json"):
        read_result(tmp_path / "r.json")
