"""Tables of papers as data files: rows, columns, published figures with their source.

`data/NAME.toml` is one table. It lists a published figure under the source it was read from, and a
source has a kind: `paper` (the authors' own figure) or `re-run` (somebody else ran the method).
A cell that was never published has no entry and stays empty.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from llava.eval.engine.request import UNPRUNED, join_words
from llava.pruning import PruningConfig, PruningError
from llava.registry import unknown
from llava.utils import UserInputError, user_path

T = TypeVar("T")

FOLDER = Path(__file__).parent / "data"
KINDS = ("paper", "re-run")
AVERAGE = "average"  # key of the retention average among published figures
TIMES = ("ttft_ms", "total_ms", "ttft_speedup", "total_speedup")
# What values of the simple fields below must be; other kinds have checks of their own.
PLAIN: dict[Any, str] = {
    str: "a text",
    str | None: "a text",
    bool: "true or false",
    int | None: "a whole number",
}


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


@dataclass(frozen=True)
class Column:
    """What a column shows: one metric of one task under one prompt protocol.

    `metric` is a key of the task's metrics, or one of `TIMES`. `no_gap` says why figures measured
    here cannot be compared with the published ones. `retention` puts the column into the average.
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
class Within:
    """What a row drops between layers of the language model, besides its method."""

    method: str
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> int | float | None:
        """Tokens of an image that a layer reads, or their share, as a mean over layers."""
        return self.keep_tokens if self.keep_ratio is None else float(self.keep_ratio)


@dataclass(frozen=True)
class Row:
    """One setting, and what was published about it by column key.

    `against` names the method whose published figures at the same budget this row is compared with,
    where none of its own were published.
    """

    method: str
    label: str
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    next_protocol: str | None = None
    against: str | None = None
    decoder: Within | None = None
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def methods(self) -> str:
        """Names of its methods: `none`, `zoo`, `fastv` or `zoo+fastv`."""
        return self.method if self.decoder is None else join_words(self.method, self.decoder.method)

    @property
    def budget(self) -> int | float | None:
        """A number of tokens if it is an integer; a share of them if it is a float (1.0: all)."""
        return self.keep_tokens if self.keep_ratio is None else float(self.keep_ratio)


@dataclass(frozen=True)
class Table:
    """One table of a paper, as `data/NAME.toml` describes it.

    `model` is the checkpoint by default, `family` its kind (`llava.eval.tables.plan.FAMILIES`,
    or a name in `llava.families`).
    `tokens` is the number of visual tokens of an unpruned image, None where it varies. `conv_mode`
    is the conversation template that the published figures were made with.
    `average_no_gap` says why the average cannot be compared with published ones.
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
        """Return every source that a cell of the table names, in order of first use."""
        used = [figure.source for row in self.rows for figure in row.published.values()]
        return list(dict.fromkeys(used))

    def averaged(self) -> list[Column]:
        """Return the columns that the retention average covers."""
        return [column for column in self.columns if column.retention and not column.timed]


def list_tables() -> list[str]:
    """Return the names of the tables that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_table(name: str | Path) -> Table:
    """Return a table by its name, or by the path of a `.toml` file of the same form.

    Raises:
        TableError: no such table, or a file that is not one.
    """
    path = user_path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if path.stem not in list_tables():
            raise TableError(unknown("table", str(name), list_tables()))
    try:
        return _table(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{path} is not TOML: {error}") from error
    except TableError as error:
        raise TableError(f"{path} does not describe a table: {error}") from error


def _table(name: str, raw: dict[str, Any]) -> Table:
    sources = {
        key: _read(Source, entry, f"source {key}", key=key)
        for key, entry in _part(raw, "sources", dict).items()
    }
    for source in sources.values():
        if source.kind not in KINDS:
            raise TableError(f"source {source.key}: {unknown('kind', source.kind, KINDS)}")
    columns = tuple(_read(Column, entry, "a column") for entry in _part(raw, "columns", list))
    keys = {*(column.key for column in columns), AVERAGE}
    if not columns or not raw.get("rows"):
        raise TableError("it needs columns and rows")
    rows = tuple(_row(entry, sources, keys) for entry in _part(raw, "rows", list))
    notes = tuple(_part(raw, "notes", list))
    nested = ("sources", "columns", "rows", "notes", AVERAGE)
    rest = {key: value for key, value in raw.items() if key not in nested}
    rest |= {f"{AVERAGE}_{key}": value for key, value in _part(raw, AVERAGE, dict).items()}
    return _read(Table, rest, "the table", name=name, columns=columns, rows=rows, notes=notes)


def _row(raw: Any, sources: Mapping[str, Source], columns: set[str]) -> Row:
    what = str(raw.get("label", "a row")) if isinstance(raw, dict) else "a row"
    decoder = None
    if isinstance(raw, dict) and "decoder" in raw:
        raw = dict(raw)
        within = _read(Within, raw.pop("decoder"), f"{what}: decoder")
        decoder = _checked(within, f"{what}: decoder", budgets=1)
    entry = _read(Row, raw, what, decoder=decoder)
    if entry.method == UNPRUNED and entry.options:
        raise TableError(f"{what} is not pruned, so it takes no options")
    checked = _checked(entry, what, budgets=int(entry.method != UNPRUNED))
    return replace(checked, published=_published(raw, what, sources, columns))


Setting = TypeVar("Setting", Row, Within)


def _checked(entry: Setting, what: str, budgets: int) -> Setting:
    """Check numbers and options of a setting that has so many budgets.

    Raises:
        TableError: it has not, or they cannot be.
    """
    given = [budget for budget in (entry.keep_tokens, entry.keep_ratio) if budget is not None]
    if len(given) != budgets:
        raise TableError(f"{what} needs one budget, or none if it is not pruned")
    if not isinstance(entry.options, Mapping):
        raise TableError(f"{what}: options must be a table of names and values")
    try:
        json.dumps(entry.options)
    except TypeError as error:  # TOML also has dates and times
        raise TableError(f"{what}: options {entry.options!r} are not plain values") from error
    try:
        # Without a method, which this package may not have: the numbers are checked all the same.
        checked = PruningConfig(keep_tokens=entry.keep_tokens, keep_ratio=entry.keep_ratio)
    except PruningError as error:
        raise TableError(f"{what}: {error}") from error
    return replace(entry, keep_tokens=checked.keep_tokens, keep_ratio=checked.keep_ratio)


def _published(
    raw: dict[str, Any], what: str, sources: Mapping[str, Source], columns: set[str]
) -> dict[str, Published]:
    """Read the published figures of a row by column; in the file they are grouped by source."""
    figures: dict[str, Published] = {}
    for key, values in _part(raw, "published", dict).items():
        if key not in sources:
            raise TableError(f"{what}: {unknown('source', key, sources)}")
        for column, value in _part({key: values}, key, dict).items():
            if column not in columns:
                raise TableError(f"{what}: {unknown('column', column, columns)}")
            if column in figures:
                raise TableError(f"{what}: two published figures for {column}")
            if type(value) not in (int, float):
                raise TableError(f"{what}: {column} must be a number but is {value!r}")
            figures[column] = Published(float(value), sources[key])
    return figures


def _part(raw: dict[str, Any], key: str, kind: type[T]) -> T:
    """Return what the file nests under `key`, by default nothing."""
    value = raw.get(key, kind())
    if not isinstance(value, kind):
        raise TableError(f"{key} must be a {'list' if kind is list else 'TOML table'}")
    return value


def _read(cls: type[T], raw: Any, what: str, **known: Any) -> T:
    """Make a dataclass of a TOML table with its fields as keys, but for those already `known`."""
    if not isinstance(raw, dict):
        raise TableError(f"{what} must be a TOML table but is {raw!r}")
    hints = {name: kind for name, kind in get_type_hints(cls).items() if name not in known}
    for key, value in raw.items():
        if key not in hints:
            raise TableError(f"{what}: {unknown('key', key, hints)}")
        kind = hints[key]
        if kind in PLAIN and not isinstance(value, kind):
            raise TableError(f"{what}: {key} must be {PLAIN[kind]} but is {value!r}")
    needed = [own.name for own in signature(cls).parameters.values() if own.default is own.empty]
    missing = [name for name in needed if name not in raw and name not in known]
    if missing:
        raise TableError(f"{what} has no {', '.join(missing)}")
    return cls(**raw, **known)
