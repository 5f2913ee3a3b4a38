"""MMBench: the spreadsheet that its server takes, from an answer file and the annotation table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.eval.tasks.tsv import Cell, Table

DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PLACE = 6  # of the column of predictions


def sheet(table: Table, answers: Mapping[Any, str]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows to upload: the annotation without what the server has, with `prediction`.

    A row without an answer keeps an empty cell. Raises TaskError for a table of too few columns.
    """
    kept = [name for name in table.columns if name not in DROPPED]
    if len(kept) < PLACE:
        raise TaskError(
            f"the annotation table has the columns {', '.join(table.columns)}; `prediction` goes "
            f"after {PLACE} that are uploaded. Is it MMBench's TSV file?"
        )
    cells = {name: table.typed(name) for name in kept}
    cells["prediction"] = [answers.get(name) for name in table.typed("index")]
    columns = [*kept[:PLACE], "prediction", *kept[PLACE:]]
    return columns, [list(row) for row in zip(*(cells[name] for name in columns), strict=True)]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    book.save(temporary)
    temporary.replace(path)
