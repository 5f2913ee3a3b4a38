"""Files of any platform: read JSON, replace a file as a whole, hold a folder for one process."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.utils import UserInputError


class StorageError(UserInputError):
    """A file cannot be read, written or locked; the message says which and why."""


def read_bytes(path: Path, *, hint: str = "", error: type[UserInputError] = StorageError) -> bytes:
    """Return the contents of a file.

    Raises:
        StorageError: (`error`) it cannot be read; the message ends in `hint`.
    """
    try:
        return path.read_bytes()
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}{hint}") from cause


def parse_json(
    content: bytes, what: str, *, hint: str = "", error: type[UserInputError] = StorageError
) -> Any:
    """Return the value of JSON text in UTF-8; errors call it `what`.

    Raises:
        StorageError: (`error`) it is not JSON; the message ends in `hint`.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is damaged, it is not JSON: {cause}{hint}") from cause


def read_json(path: Path, *, hint: str = "", error: type[UserInputError] = StorageError) -> Any:
    """Return the value in a JSON file.

    Raises:
        StorageError: (`error`) it is missing or damaged; the message ends in `hint`.
    """
    content = read_bytes(path, hint=hint, error=error)
    return parse_json(content, f"{path}", hint=hint, error=error)


def read_jsonl(
    path: Path, *, hint: str = "", error: type[UserInputError] = StorageError
) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every line of a JSON lines file, blank lines left out.

    A place, such as "line 3 of questions.jsonl", is what messages about the value should name.

    Raises:
        StorageError: (`error`) the file is missing, or a line is damaged.
    """
    # Not splitlines(): JSON may hold U+2028 unescaped, which splitlines takes for a line end.
    content = read_bytes(path, hint=hint, error=error)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, parse_json(line, where, hint=hint, error=error)


def dump_json(content: Mapping[str, Any]) -> str:
    """Return JSON text for a file that people read and diff."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dump_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """Return JSONL text, one record a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` so that a reader, or a crash, sees the old or the new content, never both.

    Folders above it are made.

    Raises:
        StorageError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb", buffering=0) as handle:
            write_through(handle, content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def write_through(handle: FileIO, data: bytes) -> None:
    """Put `data` on disk; leave no buffer that would be written again when the file closes."""
    rest = memoryview(data)
    while rest:
        rest = rest[handle.write(rest) :]
    os.fsync(handle.fileno())


def cannot_write(path: Path, error: OSError) -> StorageError:
    """Make the error of a file that cannot be written, such as on a full disk."""
    return StorageError(
        f"cannot write {path}: {error.strerror}; every answer that was given before is kept: make "
        "room and run the same command again"
    )


def lock(path: Path, what: str) -> FileLock:
    """Hold `path` for this process until `release()` or the end of the process, killed or not.

    Raises:
        StorageError: it is held already; the message calls the thing that is locked `what`.
    """
    held = FileLock(path, timeout=0, thread_local=False)
    try:
        held.acquire()
    except (Timeout, RuntimeError) as error:
        raise StorageError(
            f"another process is writing to {what}; wait for it, or give another --output"
        ) from error
    return held


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone: two writers would interleave their batches.

    Raises:
        StorageError: it cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the output folder {folder}: {error.strerror}; give another --output"
        ) from error
    held = lock(folder / ".lock", f"{folder}")
    try:
        yield
    finally:
        held.release()
