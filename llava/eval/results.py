"""Result files of one run: schema, append-only logs, resume.

A run lives in `OUTPUT/runs/<run key>/`, and the key hashes every setting, the checkpoint, the data
and the source that makes answers: another setting is another folder, so no answer is ever reused
for a question it was not given to. Whole batches are the unit of work. A batch is complete once its
answer lines are on disk, which is why its timings are written first and its answers last; whatever
a killed process left behind a complete batch is cut off when the run is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.utils import UserInputError

SCHEMA_VERSION = 1
RESULT_KEYS = ("questions", "images", "config", "run", "rows")

Record = dict[str, Any]


class ResultError(UserInputError):
    """A result file cannot be used; the message says why."""


class RunFolder:
    """The files of one run, opened for appending after its last complete batch.

    `batch_sizes[b]` is the number of answer lines of batch b, known from the plan.
    """

    def __init__(self, path: Path, batch_sizes: Sequence[int]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        answers, timings = path / "answers.jsonl", path / "timings.jsonl"
        records = _read_log(answers)
        self.done = complete_batches(records, batch_sizes)
        self.answers = records[: sum(batch_sizes[: self.done])]
        self.timings = [line for line in _read_log(timings) if line["batch"] < self.done]
        _cut(answers, self.answers)
        _cut(timings, self.timings)

    def append(self, answers: Sequence[Record], timings: Sequence[Record]) -> None:
        """Log one finished batch; when this returns, both are on disk."""
        _append(self.path / "timings.jsonl", timings)
        _append(self.path / "answers.jsonl", answers)
        self.timings += timings
        self.answers += answers
        self.done += 1

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of the run."""
        write_atomically(self.path / name, dump_json(content))


def complete_batches(records: Sequence[Record], batch_sizes: Sequence[int]) -> int:
    """Number of leading batches of the plan whose answer lines are all present."""
    position = 0
    for batch, size in enumerate(batch_sizes):
        lines = records[position : position + size]
        if len(lines) < size or any(line["batch"] != batch for line in lines):
            return batch
        position += size
    return len(batch_sizes)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone: two writers would interleave their batches."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResultError(f"another process is writing to {folder}") from error
        yield  # the lock goes with the file handle, also when the process is killed


def dump_json(content: Mapping[str, Any]) -> str:
    """JSON text of a file that people read and diff."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dump_lines(records: Sequence[Record]) -> str:
    """JSONL text, one record a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` so that a reader, or a crash, sees the old or the new text and no mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def read_result(path: Path) -> Record:
    """A result JSON written by `--save-result`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        raise ResultError(f"{path} is not a result file of schema version {SCHEMA_VERSION}")
    missing = [key for key in RESULT_KEYS if key not in result]
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}; write it again with --save-result")
    return result


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(dump_lines(records))
        handle.flush()
        os.fsync(handle.fileno())


def _read_log(path: Path) -> list[Record]:
    """Records of a JSONL log up to its first torn or damaged line."""
    records: list[Record] = []
    if not path.exists():
        return records
    with path.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _cut(path: Path, records: Sequence[Record]) -> None:
    """Reduce a log to `records`, dropping what a killed process left after them."""
    text = dump_lines(records)
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)
