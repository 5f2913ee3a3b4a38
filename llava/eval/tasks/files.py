"""Files of LLaVA's evaluation data layout: JSON, JSON lines, answer files, folders of images.

Whatever is missing or damaged becomes one TaskError that names the file. Where the file belongs to
a benchmark (`task` is given) the error also names the command that gets it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from llava import constants, storage
from llava.eval.tasks.base import TaskError, list_prepared
from llava.images import open_image
from llava.pixels import ORIGINAL

Row = dict[str, Any]


class Kind(StrEnum):
    """What a field must be, in the words of errors."""

    ID = "text or a whole number"
    TEXT = "text"
    ANY = "anything"


Fields = Mapping[str, Kind]
ANY_OBJECT: Fields = {}
QUESTION = {"question_id": Kind.ID, "image": Kind.TEXT, "text": Kind.TEXT}
ANSWER = {"question_id": Kind.ID, "text": Kind.TEXT}

# Suffixes that LLaVA-1.5 was trained with; its published question files carry them in `text`.
SHORT_ANSWER = f"\n{constants.SHORT_ANSWER}"
OPTION_LETTER = f"\n{constants.OPTION_LETTER}"
OPTION_LETTER_CN = "\n请直接回答选项字母。"

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")  # Python refuses to read thousands of digits


def with_options(question: str, options: Iterable[str]) -> str:
    """Return a question with its options below it: `A. red`, `B. blue`, ... one a line."""
    return "\n".join([question, *map("{}. {}".format, ascii_uppercase, options)])


def how_to_get(task: str | None) -> str:
    """Return the end of an error about a file of `task`: the command that gets it, if one does."""
    if task is None or task not in list_prepared():
        return ""
    return f"; `python -m llava.eval prepare {task}` gets it"


def read_bytes(path: Path, task: str | None = None) -> bytes:
    """Return the contents of a file.

    Raises:
        TaskError: it cannot be read.
    """
    return storage.read_bytes(path, hint=how_to_get(task), error=TaskError)


def read_json(path: Path, task: str | None = None) -> Any:
    """Return the value in a JSON file.

    Raises:
        TaskError: it is missing or damaged.
    """
    return storage.read_json(path, hint=how_to_get(task), error=TaskError)


def read_jsonl(path: Path, task: str | None = None, *, fields: Fields = ANY_OBJECT) -> list[Row]:
    """Return the objects that `numbered_jsonl` yields, without their places."""
    return [row for _, row in numbered_jsonl(path, task, fields=fields)]


def numbered_jsonl(
    path: Path, task: str | None = None, *, fields: Fields = ANY_OBJECT
) -> Iterator[tuple[str, Row]]:
    """Yield (place, object) of each line of a JSON lines file, blank lines left out.

    A place, such as "line 3 of questions.jsonl", is what errors about the object should name.

    Raises:
        TaskError: the file is missing, or a line is damaged or refused by `check_fields`.
    """
    hint = how_to_get(task)
    for where, row in storage.read_jsonl(path, hint=hint, error=TaskError):
        if not isinstance(row, dict):
            raise TaskError(f"{where} is not a JSON object; write one object a line{hint}")
        check_fields(row, where, fields, hint)
        yield where, row


def check_fields(row: Any, where: str, fields: Fields, hint: str = "") -> None:
    """Refuse an object whose fields are missing or of another kind.

    Args:
        row: what was read from JSON.
        where: what errors call it, such as "line 3 of questions.jsonl".
        fields: {name: what it must be} of the fields that must be there.
        hint: what errors end in.

    Raises:
        TaskError: the first field that cannot be used, with its value.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where} is not a JSON object{hint}")
    missing = [key for key in fields if key not in row]
    if missing:
        raise TaskError(f"{where} lacks {', '.join(missing)}{hint}")
    for key, kind in fields.items():
        value = row[key]
        if kind is Kind.ANY:
            continue
        if not (isinstance(value, str) if kind is Kind.TEXT else is_id(value)):
            raise TaskError(f"{key} in {where} must be {kind}, not {as_json(value)}{hint}")
        if isinstance(value, str) and not is_unicode(value):
            raise TaskError(f"{key} in {where} has half of a surrogate pair; write it in UTF-8")


def check_listed(rows: Any, what: str, path: Path, fields: Fields) -> list[Row]:
    """Return `rows` of a JSON file, if they are a list of objects that pass `check_fields`.

    `what` is what one of them is called, such as "question".

    Raises:
        TaskError: `rows` is not a list, or one of them does not pass.
    """
    if not isinstance(rows, list):
        raise TaskError(f"{path} must contain a JSON array of {what}s")
    for number, row in enumerate(rows, start=1):
        check_fields(row, f"{what} {number} of {path}", fields)
    return rows


def image_names(value: Any, where: str) -> tuple[str, ...]:
    """Return the names in an `image` field: none (missing, null, ""), one, or a list of them.

    Raises:
        TaskError: it is anything else; the message names `where`.
    """
    if value is None or value == "":
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name and is_unicode(name) for name in names):
        raise TaskError(
            f"image in {where} must be a file name or a list of names, not {as_json(value)}"
        )
    return tuple(names)


def is_id(value: Any) -> bool:
    """Tell whether a value can name a question: text or a whole number (not JSON's true)."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def is_unicode(text: str) -> bool:
    """Tell whether text has no lone surrogate, which cannot be written, hashed or tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_json(value: Any) -> str:
    """Return a value as JSON writes it, cut to one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def index_by(rows: Iterable[Any], key: str, path: Path) -> dict[Any, Any]:
    """Return `{row[key]: row}` in the order of `rows` of `path`.

    Raises:
        TaskError: two rows share a key.
    """
    found: dict[Any, Any] = {}
    for row in rows:
        if row[key] in found:
            raise TaskError(f"{path} has {key} {row[key]!r} twice; keep one of the two lines")
        found[row[key]] = row
    return found


def check_ids(given: Iterable[Any], known: Iterable[Any], given_in: Path, known_in: Path) -> None:
    """Refuse ids of `given_in` that are not in `known_in`.

    Raises:
        TaskError: one is unknown; the message names the first.
    """
    known = set(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TaskError(
            f"{given_in} has {len(unknown)} question ids that are not in {known_in}, the first "
            f"is {unknown[0]!r}; do both files belong to one split?"
        )


def question_key(name: str | int) -> str | int:
    """Return the id as a number where it is one: files write 7 and "7" for the same question."""
    return int(name) if isinstance(name, int) or _INTEGER.fullmatch(name) else name


def read_answers(path: Path, fields: Fields = ANSWER) -> dict[str | int, Row]:
    """Return {question id, by `question_key`: line of LLaVA's answer file} in file order.

    Several rounds of one question (`round_id`) are no duplicates; the last one of them stays.

    Raises:
        TaskError: the file is missing, damaged or empty, a line lacks one of `fields`, or a
            question is answered twice.
    """
    answers: dict[str | int, Row] = {}
    seen = set()
    for row in read_jsonl(path, fields=fields):
        name = question_key(row["question_id"])
        place = name, str(row.get("round_id", 0))
        if place in seen:
            raise TaskError(f"{path} answers question {name!r} twice; keep one of the two lines")
        seen.add(place)
        answers[name] = row
    if not answers:
        raise TaskError(f"{path} has no answers")
    return answers


def read_intact_answers(path: Path) -> tuple[dict[Any, str], int]:
    """Return ({question id: text}, damaged lines) of an answer file; damaged lines are left out.

    LLaVA's converters for servers count lines that are not JSON and go on; so does this. Raises
    TaskError for a repeated id and for a line without question_id or text.
    """
    rows, damaged = [], 0
    content = read_bytes(path)
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {path}"
        try:
            rows.append(storage.parse_json(line, where))
        except storage.StorageError:
            damaged += 1
            continue
        check_fields(rows[-1], where, ANSWER)
    return {name: row["text"] for name, row in index_by(rows, "question_id", path).items()}, damaged


def is_file(path: Path) -> bool:
    """Tell whether there is such a file; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def hash_files(paths: Iterable[Path], images: Iterable[tuple[str, int]] = ()) -> str:
    """Return the SHA-256 (hex) over the contents of `paths`, in order, and over (name, size) pairs.

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
        """Return an image, RGB.

        Raises:
            UserInputError: there is none, or it is damaged.
        """
        self._check()
        return open_image(self.root / name, pixels)

    def sizes(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """Return sorted (name, bytes) of the images called `names`; -1 bytes for a missing one."""
        self._check()
        return [(name, self._size(name)) for name in sorted(set(names))]

    def _size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except (OSError, ValueError):  # ValueError: names that no file can have
            return -1

    def _check(self) -> None:
        if not self.root.is_dir():
            raise TaskError(f"there is no image folder {self.root}{how_to_get(self.task)}")
