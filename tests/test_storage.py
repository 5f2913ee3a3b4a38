"""Reading JSON with one-line errors; locks that end with their process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava.storage import StorageError, lock, read_json, read_jsonl, write_atomically
from llava.utils import UserInputError


class OtherError(UserInputError):
    pass


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(StorageError, match=r"cannot read .*a\.json: No such file"):
        read_json(file)
    for damaged in (b'{"a": ', b"\xff", b"[" * 200_000):
        file.write_bytes(damaged)
        with pytest.raises(OtherError, match=r"a\.json is damaged, it is not JSON: .*; get it"):
            read_json(file, hint="; get it", error=OtherError)
    write_atomically(file, '{"a": [1]}')
    assert read_json(file) == {"a": [1]}


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_atomically(file, '{"a": "\u2028"}\n\n[2]\r\n'.encode())
    rows = list(read_jsonl(file))
    assert rows == [(f"line 1 of {file}", {"a": "\u2028"}), (f"line 3 of {file}", [2])]
    file.write_text("1\n{\n")
    with pytest.raises(StorageError, match=r"line 2 of .*a\.jsonl is damaged"):
        list(read_jsonl(file))


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import sys; from pathlib import Path; from llava.storage import lock;"
        "held = lock(Path(sys.argv[1]), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process is writing to x"):
            lock(path, "x")
        other.kill()
        other.wait()
    held = lock(path, "x")
    with pytest.raises(StorageError, match="another process"):
        lock(path, "x")
    held.release()
    lock(path, "x").release()
