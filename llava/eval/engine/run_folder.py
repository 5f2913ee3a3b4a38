"""The folder of one run: append-only logs of its batches, and how an interrupted run resumes.

A run lives in `OUTPUT/runs/<run key>/`, and the key hashes every setting, the checkpoint, the data
and the source that makes answers: another setting is another folder, so no answer is ever reused
for a question it was not given to. Whole batches are the unit of work. Each process appends them to
a log of its own in `log/`. A batch is complete once its answer lines are on disk, which is why its
timings are written first and its answers last; whatever a killed process left after a complete
batch is cut off when its log is opened again. Files for readers are made from the logs at the end.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from llava import storage
from llava.eval.engine.schema import Record
from llava.storage import cannot_write, dump_json, dump_lines, lock, write_atomically


class RunFolder:
    """The files of one run, with the log of process `rank` opened for appending.

    Args:
        path: the folder.
        batch_sizes: `batch_sizes[b]` is the number of answer lines of batch b, known from the plan.
        rank: of this process; each has a log of its own.

    Raises:
        StorageError: another process has opened this log.
    """

    def __init__(self, path: Path, batch_sizes: Sequence[int], rank: int = 0) -> None:
        self.path = path
        self.batch_sizes = list(batch_sizes)
        self.log = path / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        self._own = self.log / f"answers-{rank}.jsonl"
        self._lock = lock(self.log / f".lock-{rank}", f"{self._own}")
        complete = self._batches(self._own)
        _cut(self._own, [line for lines in complete.values() for line in lines])
        timings = _read_log(_timings_of(self._own))
        _cut(_timings_of(self._own), [line for line in timings if line["batch"] in complete])

    def remaining(self) -> list[int]:
        """Return the numbers of the batches that no log has yet, ascending."""
        done = {number for log in self._logs() for number in self._batches(log)}
        return [number for number in range(len(self.batch_sizes)) if number not in done]

    def append(self, answers: Sequence[Record], timings: Sequence[Record]) -> None:
        """Log one finished batch; when this returns, both are on disk."""
        _append(_timings_of(self._own), timings)
        _append(self._own, answers)

    def read(self) -> tuple[list[Record], list[Record]]:
        """Return the answers so far by their items' index, and the timings by batch."""
        answers: dict[int, list[Record]] = {}
        timings: list[Record] = []
        for log in self._logs():
            # Two processes may have answered a batch, if one outlived the run it belonged to.
            fresh = {n: lines for n, lines in self._batches(log).items() if n not in answers}
            answers |= fresh
            timings += [line for line in _read_log(_timings_of(log)) if line["batch"] in fresh]
        lines = [line for number in sorted(answers) for line in answers[number]]
        return (
            sorted(lines, key=lambda line: line["index"]),
            sorted(timings, key=lambda line: line["batch"]),
        )

    def write_lines(self, name: str, records: Sequence[Record]) -> None:
        """Replace a JSONL file of the run."""
        write_atomically(self.path / name, dump_lines(records))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of the run."""
        write_atomically(self.path / name, dump_json(content))

    def close(self) -> None:
        """Release the log."""
        self._lock.release()

    def _logs(self) -> list[Path]:
        return sorted(self.log.glob("answers-*.jsonl"))

    def _batches(self, log: Path) -> dict[int, list[Record]]:
        """Read the batches of a log whose answer lines are all there, by number."""
        found: dict[int, list[Record]] = {}
        for number, group in groupby(_read_log(log), key=lambda line: line["batch"]):
            lines = list(group)
            known = number in range(len(self.batch_sizes))
            if not known or len(lines) != self.batch_sizes[number]:
                break
            found[number] = lines
        return found


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("ab", buffering=0) as handle:
        start = handle.seek(0, os.SEEK_END)
        try:
            storage.write_through(handle, dump_lines(records).encode())
        except OSError as error:
            with suppress(OSError):  # what is torn is also cut when the log is next opened
                os.truncate(path, start)
            raise cannot_write(path, error) from error


def _timings_of(log: Path) -> Path:
    return log.with_name(log.name.replace("answers", "timings", 1))


def _read_log(path: Path) -> list[Record]:
    """Read the records of a JSONL log up to its first torn or damaged line."""
    records: list[Record] = []
    if not path.exists():
        return records
    with path.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("batch"), int):
                break
            records.append(record)
    return records


def _cut(path: Path, records: Sequence[Record]) -> None:
    """Reduce a log to `records`, dropping what a killed process left after them."""
    text = dump_lines(records)
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)
