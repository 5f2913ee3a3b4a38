"""Fill the cells of a table: what finished runs measured, next to what was published."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.eval.engine.metrics import BatchTimes
from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import Record, read_lines, read_metrics
from llava.eval.tables.plan import (
    Budgets,
    Place,
    arm_name,
    next_protocol_of,
    printed_budget,
    unavailable,
)
from llava.eval.tables.spec import AVERAGE, Column, Published, Row, Table, TableError
from llava.storage import StorageError

# What a row and the one whose published figures it borrows have in common.
SETTING = ("keep_tokens", "keep_ratio", "next_protocol")


@dataclass(frozen=True)
class Measured:
    """A figure of one run: value, standard error (None: undefined), number of items."""

    value: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """One cell. `gap` is measured minus published, None with a reason in `no_gap`.

    `borrowed` marks a published figure of the method that the row is compared with. `floor` is the
    lowest mean of tokens a layer, where that is why nothing is measured.
    """

    published: Published | None
    measured: Measured | None
    borrowed: bool = False
    no_gap: str | None = None
    floor: int | None = None

    @property
    def gap(self) -> float | None:
        if self.published is None or self.measured is None or self.no_gap is not None:
            return None
        return self.measured.value - self.published.value


@dataclass(frozen=True)
class FilledRow:
    """A row with its cells by column key; `unavailable` names what is missing to measure it.

    `refusal` is why the method would not prune as asked (a budget it cannot meet). `budget` is the
    budget that ran, `arm` the name of the arm that had it. `tokens` and `ttft_ms` are means over
    the table's runs.
    """

    row: Row
    budget: int | float | None
    next_protocol: str
    cells: Mapping[str, Cell]
    average: Cell
    unavailable: str | None
    refusal: str | None = None
    tokens: float | None = None
    ttft_ms: float | None = None
    arm: str = UNPRUNED

    @property
    def complete(self) -> bool:
        """Return whether the row can have a figure in every column."""
        return self.unavailable is None and self.refusal is None

    def cell(self, column: Column) -> Cell:
        return self.average if column.key == AVERAGE else self.cells[column.key]


@dataclass(frozen=True)
class Filled:
    """A table with everything that is known about its cells.

    `counts`: items per column key. `covered`: titles of the columns that the average takes in.
    `problems`: what did not run or not completely, one line each. `no_gap`, `demo`: see `fill`.
    """

    table: Table
    rows: tuple[FilledRow, ...]
    counts: Mapping[str, int]
    covered: tuple[str, ...]
    problems: tuple[str, ...] = ()
    no_gap: str | None = None
    demo: bool = False


@dataclass(frozen=True)
class RunResult:
    """`metrics.json` and `timings.jsonl` of a finished run."""

    arms: Mapping[str, Mapping[str, Any]]
    timings: Sequence[Record]

    def figure(self, arm: str, column: Column) -> Measured | None:
        """Return what the run measured of an arm; None if it did not."""
        if arm not in self.arms:
            return None
        if column.timed:
            return self.time(arm, column.metric)
        metric = self.arms[arm]["metrics"].get(column.metric)
        return None if metric is None else Measured(metric["value"], metric["se"], metric["n"])

    def time(self, arm: str, metric: str) -> Measured | None:
        """Return a median over batches; speed-ups are paired by batch. None without times."""
        which, kind = metric.split("_")

        def value(own: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
            if kind != "speedup":
                return _totals(own)[which]
            return _totals(base)[which] / _totals(own)[which] if base else None

        found, n = BatchTimes(self.timings).median(arm, value)
        return None if found is None else Measured(found, None, n)


def _totals(line: Mapping[str, Any]) -> dict[str, float]:
    """Return ms per question up to the first token (`ttft`) and to the end of the answer (`total`).

    Tables of answer times run one question at a time, so the tokens of a batch are the answer's;
    the token after the last one ends it, so there is one decoding step per token.
    """
    parts = ("encode_ms", "prune_ms", "splice_ms", "prefill_ms")
    first = math.fsum(line[part] or 0.0 for part in parts)
    return {"ttft": first, "total": first + line["new_tokens"] * (line["decode_ms"] or 0.0)}


def read_run(folder: Path) -> RunResult:
    """Read the files of a finished run.

    Raises:
        TableError: it is not one.
    """
    try:
        arms = read_metrics(folder)["arms"]
        return RunResult(arms, read_lines(folder / "timings.jsonl"))
    except StorageError as error:
        raise TableError(f"{folder} has no finished run: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise TableError(f"{folder} has no finished run: metrics.json names no arms") from error


Results = Mapping[Place, RunResult]


def fill(
    table: Table,
    results: Results,
    budgets: Budgets,
    *,
    demo: bool = False,
    no_gap: str | None = None,
    problems: Sequence[str] = (),
) -> Filled:
    """Put every measured figure next to the published one.

    Args:
        table: what to fill.
        results: finished runs.
        budgets: as the runs were planned with.
        demo: the runs are of llava-tiny, which has no tiles, on drawn data.
        no_gap: why their figures cannot be compared with published ones, such as a limit.
        problems: what did not run, one line each.
    """
    no_gap = "demo" if demo else no_gap
    measured = [_fill_row(table, row, results, budgets, demo, no_gap) for row in table.rows]
    complete = [ratios for row, ratios in measured if row.complete]
    averaged = table.averaged()
    covered = [
        column for column in averaged if complete and all(column.key in own for own in complete)
    ]
    average_no_gap = no_gap or table.average_no_gap
    if not covered or covered != averaged:
        average_no_gap = average_no_gap or "the average does not cover every task of the table"
    rows = []
    for row, ratios in measured:
        average = None
        if covered and row.complete:
            found = [ratios[column.key] for column in covered]
            average = Measured(100 * math.fsum(found) / len(found), None, len(found))
        rows.append(replace(row, average=_cell(table, row.row, AVERAGE, average, average_no_gap)))
    titles = tuple(column.title for column in covered)
    return Filled(table, tuple(rows), _counts(rows), titles, tuple(problems), no_gap, demo)


def _fill_row(
    table: Table, row: Row, results: Results, budgets: Budgets, demo: bool, no_gap: str | None
) -> tuple[FilledRow, dict[str, float]]:
    """Return a row but for its average, and pruned / unpruned of the columns that have both."""
    arm, reading = arm_name(row, budgets), next_protocol_of(row, native_only=demo)
    lacking = unavailable(table, row)
    runs: dict[int, RunResult] = {}  # that have the arm, each once
    cells: dict[str, Cell] = {}
    ratios: dict[str, float] = {}
    for column in table.columns:
        run = results.get((column.task, column.protocol, reading))
        measured = None
        if run is not None and arm in run.arms and lacking is None:
            runs[id(run)] = run
            measured, base = run.figure(arm, column), run.figure(UNPRUNED, column)
            if measured is not None and base is not None and base.value > 0:
                ratios[column.key] = measured.value / base.value
        cell = _cell(table, row, column.key, measured, no_gap or column.no_gap)
        own = {} if run is None or lacking is not None else run.arms.get(arm, {})
        cells[column.key] = replace(cell, floor=own.get("floor"))
    times = [run.time(arm, "ttft_ms") for run in runs.values()]
    arms = [run.arms[arm] for run in runs.values()]
    filled = FilledRow(
        row=row,
        budget=printed_budget(row, budgets),
        next_protocol=reading,
        cells=cells,
        average=Cell(None, None),
        unavailable=lacking,
        refusal=next((own["unavailable"] for own in arms if own.get("unavailable")), None),
        tokens=_mean([own.get("tokens_mean") for own in arms]),
        ttft_ms=_mean([None if time is None else time.value for time in times]),
        arm=arm,
    )
    return filled, ratios


def _cell(table: Table, row: Row, key: str, measured: Measured | None, no_gap: str | None) -> Cell:
    """Return a cell with the row's own published figure, else that of the method in `against`."""
    if key in row.published or row.against is None:
        return Cell(row.published.get(key), measured, no_gap=no_gap)
    for other in table.rows:
        same = all(getattr(other, name) == getattr(row, name) for name in SETTING)
        if other.methods == row.against and same and key in other.published:
            return Cell(other.published[key], measured, borrowed=True, no_gap=no_gap)
    return Cell(None, measured, no_gap=no_gap)


def _counts(rows: Sequence[FilledRow]) -> dict[str, int]:
    """Return how many items the figures of each column are over."""
    counts: dict[str, int] = {}
    for row in rows:
        for key, cell in row.cells.items():
            if cell.measured is not None:
                counts[key] = max(cell.measured.n, counts.get(key, 0))
    return counts


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that exist."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None
