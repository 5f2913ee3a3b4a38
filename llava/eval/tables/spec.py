"""A table is a data file: rows, columns, published figures with their source.

`data/NAME.toml` holds one table. A published figure stands under the source it was read from, and
a source has a kind: `paper` (the authors' own figure) or `re-run` (somebody else ran the method).
A cell that nobody published has no entry, and nothing is ever filled in for it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llava.eval.engine.request import UNPRUNED
from llava.pruning import PruningConfig, PruningError
from llava.utils import UserInputError, user_path

FOLDER = Path(__file__).parent / "data"
KINDS = ("paper", "re-run")
AVERAGE = "average"  # key of the retention average among published figures
TIMES = ("ttft_ms", "total_ms", "ttft_speedup", "total_speedup")


class TableError(UserInputError):
    """A table file, or the name of one, cannot be used; the message says why."""


@dataclass(frozen=True)
class Source:
    """Where published figures were read. `kind` is one of `KINDS`."""

    key: str
    kind: str
    text: str


@dataclass(frozen=True)
class Published:
    """One published figure."""

    value: float
    source: Source

    @property
    def kind(self) -> str:
        return self.source.kind


@dataclass(frozen=True)
class Column:
    """What a column shows: one metric of one task under one prompt protocol.

    `metric` is a key of the task's metrics, or one of `TIMES`. `no_gap` says why figures measured
    here cannot be held against the published ones. `retention` puts the column into the average.
    """

    key: str
    title: str
    task: str
    metric: str
    protocol: str | None = None
    no_gap: str | None = None
    retention: bool = True

    @property
    def timed(self) -> bool:
        return self.metric in TIMES


@dataclass(frozen=True)
class Row:
    """One setting, and what was published about it by column key.

    `against` names the method whose published figures at the same budget this row is held against,
    where nobody published any of its own.
    """

    method: str
    label: str
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    next_protocol: str | None = None
    against: str | None = None
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def budget(self) -> int | float | None:
        """An integer is a number of tokens, a float a share of them (1.0 is all of them)."""
        return self.keep_tokens if self.keep_ratio is None else float(self.keep_ratio)


@dataclass(frozen=True)
class Table:
    """One table of a paper, as `data/NAME.toml` describes it.

    `tokens` is the number of visual tokens of an unpruned image, None where it varies. `conv_mode`
    is the conversation template that the published figures were made with.
    `average_no_gap` says why the average cannot be held against published ones.
    """

    name: str
    title: str
    model: str
    family: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    tokens: int | None = None
    conv_mode: str | None = None
    batch_size: int | None = None
    notes: tuple[str, ...] = ()
    average_no_gap: str | None = None

    def sources(self) -> list[Source]:
        """Every source that a cell of the table names, in order of first use."""
        used = [figure.source for row in self.rows for figure in row.published.values()]
        return list(dict.fromkeys(used))

    def averaged(self) -> list[Column]:
        """The columns that the retention average covers."""
        return [column for column in self.columns if column.retention and not column.timed]


def list_tables() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_table(name: str | Path) -> Table:
    """A table by its name, or by the path of a `.toml` file of the same form.

    Raises:
        TableError: no such table, or a file that is not one.
    """
    path = user_path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if path.stem not in list_tables():
            close = get_close_matches(str(name), list_tables(), n=3, cutoff=0.4) or list_tables()
            raise TableError(f"unknown table {str(name)!r}; did you mean {', '.join(close)}?")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{path} is not TOML: {error}") from error
    try:
        return _table(path.stem, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"{path} does not describe a table: {error}") from error


def _table(name: str, raw: dict[str, Any]) -> Table:
    sources = {key: Source(key, **entry) for key, entry in raw.pop("sources", {}).items()}
    for source in sources.values():
        if source.kind not in KINDS:
            raise ValueError(f"source {source.key} has kind {source.kind!r}, not one of {KINDS}")
    columns = tuple(Column(**entry) for entry in raw.pop("columns"))
    keys = {column.key for column in columns} | {AVERAGE}
    rows = tuple(_row(entry, sources, keys) for entry in raw.pop("rows"))
    notes = tuple(raw.pop("notes", ()))
    average = raw.pop(AVERAGE, {})
    return Table(
        name, columns=columns, rows=rows, notes=notes, average_no_gap=average.get("no_gap"), **raw
    )


def _row(raw: dict[str, Any], sources: Mapping[str, Source], keys: set[str]) -> Row:
    figures: dict[str, Published] = {}
    for source, values in raw.pop("published", {}).items():
        for key, value in values.items():
            if key not in keys or key in figures:
                raise ValueError(f"{raw['label']}: {key} has no column, or two figures")
            figures[key] = Published(float(value), sources[source])
    row = Row(published=figures, **raw)
    budgets = [budget for budget in (row.keep_tokens, row.keep_ratio) if budget is not None]
    if len(budgets) != (row.method != UNPRUNED):
        raise ValueError(f"{row.label} needs one budget, or none if it is not pruned")
    try:
        # Without a method, which this package may not have: the numbers are checked all the same.
        checked = PruningConfig(keep_tokens=row.keep_tokens, keep_ratio=row.keep_ratio)
    except PruningError as error:
        raise ValueError(f"{row.label}: {error}") from error
    _check_options(row)
    return replace(row, keep_tokens=checked.keep_tokens, keep_ratio=checked.keep_ratio)


def _check_options(row: Row) -> None:
    """Raise ValueError unless the options of a row can be those of a method."""
    if not isinstance(row.options, Mapping):
        raise ValueError(f"{row.label}: options must be a table of names and values")
    if row.method == UNPRUNED and row.options:
        raise ValueError(f"{row.label} is not pruned, so it takes no options")
    try:
        json.dumps(row.options)
    except TypeError as error:  # TOML also has dates and times
        raise ValueError(f"{row.label}: options {row.options!r} are not plain values") from error
