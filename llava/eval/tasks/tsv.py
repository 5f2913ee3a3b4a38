"""Tables as MMBench publishes them (tab-separated, quoted cells, empty cells) and takes them."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import how_to_get, read_bytes
from llava.storage import write_atomically

Cell = int | float | str | None

# What the published readers (pandas) take for an empty cell. "None" is among them: an option that
# reads "None" does not exist in MMBench's own evaluation either.
_MISSING_WORDS = """#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a
nan null"""
MISSING = frozenset(["", "#N/A N/A", *_MISSING_WORDS.split()])
_INTEGER = re.compile(r"[+-]?\d{1,100}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Table:
    """A table: its column names, and its rows as {column: text, None where the cell is empty}."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, str | None], ...]

    def typed(self, column: str) -> list[Cell]:
        """Return the cells of a column, as numbers where all that are not empty are numbers."""
        cells = [row[column] for row in self.rows]
        filled = [cell for cell in cells if cell is not None]
        for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
            if filled and all(pattern.fullmatch(cell) for cell in filled):
                return [None if cell is None else kind(cell) for cell in cells]
        return list(cells)


def read_table(path: Path, task: str | None = None, columns: Sequence[str] = ()) -> Table:
    """Read a TSV file whose first line names the columns.

    Raises:
        TaskError: it is missing, is not UTF-8 text, lacks one of `columns`, or a row (named by its
            number, from 1) has another number of cells than the first line.
    """
    hint = how_to_get(task)
    content = read_bytes(path, task)
    try:
        lines = _parse(content.decode("utf-8-sig"))
    except (ValueError, csv.Error) as error:
        raise TaskError(f"{path} is damaged, it is not a TSV table: {error}{hint}") from error
    header = tuple(lines[0]) if lines else ()
    missing = [name for name in columns if name not in header]
    if missing:
        raise TaskError(f"{path} lacks the columns {', '.join(missing)}{hint}")
    rows = []
    for number, cells in enumerate(lines[1:], start=1):
        if len(cells) != len(header):
            raise TaskError(
                f"row {number} of {path} has {len(cells)} cells instead of {len(header)}; the file "
                f"is damaged or cut short{hint}"
            )
        values = (None if cell in MISSING else cell for cell in cells)
        rows.append(dict(zip(header, values, strict=True)))
    return Table(header, tuple(rows))


def write_cell(value: Any) -> str:
    """Return a cell as the published tables have it: empty for null, quotes where needed."""
    text = "" if value is None else str(value)
    if any(mark in text for mark in '\t\n\r"'):
        return '"' + text.replace('"', '""') + '"'
    return text


def write_xlsx(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write a workbook of one sheet. Text stays text, also where it starts like a formula.

    Raises:
        TaskError: openpyxl is not installed.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise TaskError(
            "writing MMBench's spreadsheet needs openpyxl; pip install 'llava[eval]'"
        ) from error
    book = Workbook()
    for number, row in enumerate([columns, *rows], start=1):
        for column, value in enumerate(row, start=1):
            cell = book.active.cell(number, column)
            if isinstance(value, str):
                cell.value, cell.data_type = ILLEGAL_CHARACTERS_RE.sub("", value), "s"
            else:
                cell.value = value
    content = io.BytesIO()
    book.save(content)
    write_atomically(path, content.getvalue())


def _parse(text: str) -> list[list[str]]:
    """Return rows of cells, without blank lines. Images in cells exceed csv's usual limit."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        return [row for row in reader if row]
    finally:
        csv.field_size_limit(limit)
