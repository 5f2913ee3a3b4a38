"""Files of LLaVA's evaluation data layout: JSON, JSON lines, folders of images.

Whatever is missing or damaged becomes one TaskError that names the file. Where the file belongs to
a benchmark (`task` is given) the error also names the command that gets it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.tasks.base import TaskError
from llava.images import open_image
from llava.pixels import ORIGINAL

# Suffixes that LLaVA-1.5 was trained with; its published question files carry them in `text`.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTION_LETTER_CN = "\n请直接回答选项字母。"


def read_bytes(path: Path, task: str | None = None) -> bytes:
    """Contents of a file; TaskError naming it (and how `task` gets it) if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}{_how_to_get(task)}") from error


def read_json(path: Path, task: str | None = None) -> Any:
    """The value in a JSON file. Raises TaskError if it is missing or damaged."""
    content = read_bytes(path, task)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path} is damaged, it is not JSON: {error}{_how_to_get(task)}") from error


def read_jsonl(
    path: Path,
    task: str | None = None,
    keys: Sequence[str] = (),
    texts: Sequence[str] = (),
    ids: Sequence[str] = (),
) -> list[Any]:
    """The objects that `numbered_jsonl` yields, without their places."""
    return [row for _, row in numbered_jsonl(path, task, keys, texts, ids)]


def numbered_jsonl(
    path: Path,
    task: str | None = None,
    keys: Sequence[str] = (),
    texts: Sequence[str] = (),
    ids: Sequence[str] = (),
) -> Iterator[tuple[str, Any]]:
    """(place, object) of each line of a JSON lines file, blank lines left out.

    A place, such as "line 3 of questions.jsonl", is what errors about the object should name.

    Raises:
        TaskError: the file is missing, or a line is damaged or not an object, lacks one of
            `keys`, or is refused by `check_fields`.
    """
    # Not splitlines(): JSON may hold U+2028 and its like unescaped, which that takes for line ends.
    for number, line in enumerate(read_bytes(path, task).split(b"\n"), start=1):
        if line.strip():
            where, hint = f"line {number} of {path}", _how_to_get(task)
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{where} is damaged, it is not JSON: {error}{hint}") from error
            check_fields(row, where, keys, texts, ids, hint)
            yield where, row


def check_fields(
    row: Any,
    where: str,
    keys: Sequence[str] = (),
    texts: Sequence[str] = (),
    ids: Sequence[str] = (),
    hint: str = "",
) -> None:
    """Refuse an object whose fields are missing or of another kind.

    Args:
        row: what was read from JSON.
        where: what errors call it, such as "line 3 of questions.jsonl".
        keys: fields that must be there.
        texts: fields that must be text.
        ids: fields that must be text or whole numbers.
        hint: what errors end in.

    Raises:
        TaskError: the first field that cannot be used, with its value.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where} is no JSON object{hint}")
    missing = [key for key in dict.fromkeys((*ids, *keys, *texts)) if key not in row]
    if missing:
        raise TaskError(f"{where} lacks {', '.join(missing)}{hint}")
    for key in (*ids, *texts):
        if key in texts and not isinstance(row[key], str):
            raise TaskError(f"{key} in {where} is no text but {shown(row[key])}{hint}")
        if not is_id(row[key]):
            raise TaskError(
                f"{key} in {where} is no text or whole number but {shown(row[key])}{hint}"
            )
        if isinstance(row[key], str) and not _is_unicode(row[key]):
            raise TaskError(f"{key} in {where} holds half of a surrogate pair; write it in UTF-8")


def check_listed(
    rows: Any,
    what: str,
    path: Path,
    keys: Sequence[str] = (),
    texts: Sequence[str] = (),
    ids: Sequence[str] = (),
) -> list[Any]:
    """`rows` of a JSON file, if they are a list of objects that pass `check_fields`.

    `what` is what one of them is called, such as "question". Raises TaskError otherwise.
    """
    if not isinstance(rows, list):
        raise TaskError(f"{path} holds no JSON array of {what}s")
    for number, row in enumerate(rows, start=1):
        check_fields(row, f"{what} {number} of {path}", keys, texts, ids)
    return rows


def image_names(value: Any, where: str) -> tuple[str, ...]:
    """The names in an `image` field: none (missing, null, ""), one, or a list of them.

    Raises TaskError, naming `where`, for anything else.
    """
    if value is None or value == "":
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name and _is_unicode(name) for name in names):
        raise TaskError(
            f"image in {where} is no name of a file, or list of names, but {shown(value)}"
        )
    return tuple(names)


def is_id(value: Any) -> bool:
    """Whether a value can name a question: text or a whole number (JSON's true is neither)."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as JSON writes it, cut to one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def index_by(rows: Iterable[Any], key: str, path: Path) -> dict[Any, Any]:
    """`{row[key]: row}` in the order of `rows` of `path`.

    Raises TaskError where two rows share a key, and for keys that are not text or a number.
    """
    found: dict[Any, Any] = {}
    for row in rows:
        if not is_id(row[key]):
            raise TaskError(f"{path} holds {key} {row[key]!r}, which is no text or whole number")
        if row[key] in found:
            raise TaskError(f"{path} holds {key} {row[key]!r} twice; keep one of the two lines")
        found[row[key]] = row
    return found


def check_ids(given: Iterable[Any], known: Iterable[Any], given_in: Path, known_in: Path) -> None:
    """Refuse ids of `given_in` that `known_in` does not hold. Raises TaskError with the first."""
    known = set(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TaskError(
            f"{given_in} holds {len(unknown)} question ids that are not in {known_in}, the first "
            f"is {unknown[0]!r}; do both files belong to one split?"
        )


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def hash_files(paths: Iterable[Path], images: Iterable[tuple[str, int]] = ()) -> str:
    """SHA-256 (hex) over the contents of `paths`, in their order, and over (name, size) pairs.

    `images` come from `ImageFolder.sizes`: hashing gigabytes of pictures before every run would
    take longer than many a run.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    for name, size in images:
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """The images of a benchmark, by their name relative to `root`."""

    root: Path
    task: str | None = None

    def load(self, name: str, pixels: str = ORIGINAL) -> Image.Image:
        """An image, RGB. Raises UserInputError if there is none or it cannot be decoded."""
        self._check()
        return open_image(self.root / name, pixels)

    def sizes(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """Sorted (name, bytes) of the images called `names`; -1 bytes for one that is missing."""
        self._check()
        return [(name, self._size(name)) for name in sorted(set(names))]

    def _size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except (OSError, ValueError):  # ValueError: names that no file can have
            return -1

    def _check(self) -> None:
        if not self.root.is_dir():
            raise TaskError(f"there is no image folder {self.root}{_how_to_get(self.task)}")


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which cannot be written, hashed or tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _how_to_get(task: str | None) -> str:
    return f"; `python -m llava.eval prepare {task}` gets it" if task else ""
