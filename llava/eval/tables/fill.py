"""From finished runs to cells: what was measured, next to what was published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.engine.metrics import BatchTimes
from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import read_lines, read_metrics
from llava.eval.tables.plan import Budgets, Place, arm_name, next_protocol_of, unavailable
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

    `borrowed` marks a published figure of the method that the row is compared with.
    """

    published: Published | None
    measured: Measured | None
    borrowed: bool = False
    no_gap: str | None = None

    @property
    def gap(self) -> float | None:
        if self.published is None or self.measured is None or self.no_gap is not None:
            return None
        return self.measured.value - self.published.value


@dataclass(frozen=True)
class FilledRow:
    """A row with its cells by column key; `unavailable` names what is missing to measure it.

    `refusal` is why the method would not prune as asked (a budget it cannot meet). `budget` is the
    budget that ran. `tokens` and `ttft_ms` are means over the table's runs, for the plots.
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
    timings: Sequence[Mapping[str, Any]]

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


@dataclass(frozen=True)
class _RowRuns:
    """The runs that measured one row, by column key, and the name of its arm in them."""

    row: Row
    arm: str
    unavailable: str | None
    runs: Mapping[str, RunResult]

    @property
    def refusal(self) -> str | None:
        reasons = (run.arms[self.arm].get("unavailable") for run in self._own())
        return next((str(reason) for reason in reasons if reason), None)

    @property
    def complete(self) -> bool:
        """Whether the row can have figures in every column."""
        return self.unavailable is None and self.refusal is None

    def figure(self, column: Column, arm: str | None = None) -> Measured | None:
        run = self.runs.get(column.key)
        return None if run is None else run.figure(arm or self.arm, column)

    def ratio(self, column: Column) -> float | None:
        """Return pruned / unpruned, None where one is missing or there is no dividing by it."""
        own, base = self.figure(column), self.figure(column, UNPRUNED)
        return own.value / base.value if own and base and base.value > 0 else None

    def tokens(self) -> float | None:
        """Return the mean number of visual tokens over the runs."""
        return _mean(run.arms[self.arm].get("tokens_mean") for run in self._own())

    def ttft_ms(self) -> float | None:
        """Return the mean time to the first token over the runs."""
        times = (run.time(self.arm, "ttft_ms") for run in self._own())
        return _mean(None if time is None else time.value for time in times)

    def _own(self) -> list[RunResult]:
        """Return the different runs that have the arm."""
        return list({id(run): run for run in self.runs.values() if self.arm in run.arms}.values())


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
    found = [_runs_of(table, row, results, budgets, demo) for row in table.rows]
    complete = [own for own in found if own.complete]
    covered = [
        column
        for column in table.averaged()
        if complete and all(own.ratio(column) is not None for own in complete)
    ]
    average_no_gap = no_gap or table.average_no_gap
    if not covered or covered != table.averaged():
        average_no_gap = average_no_gap or "the average does not cover every task of the table"
    rows = []
    columns = {column.key: column for column in table.columns}
    for own in found:
        cells = {
            column.key: _cell(
                table, own.row, column.key, own.figure(column), no_gap or column.no_gap
            )
            for column in table.columns
        }
        average = None
        if covered and own.complete:
            ratios = [own.ratio(column) or 0.0 for column in covered]
            average = Measured(100 * math.fsum(ratios) / len(ratios), None, len(ratios))
        rows.append(
            FilledRow(
                row=own.row,
                budget=budgets(own.row),
                next_protocol=next_protocol_of(own.row, native_only=demo),
                cells=cells,
                average=_cell(table, own.row, AVERAGE, average, average_no_gap),
                unavailable=own.unavailable,
                refusal=own.refusal,
                tokens=own.tokens(),
                ttft_ms=own.ttft_ms(),
            )
        )
    counts = {key: _count(rows, key) for key in columns}
    return Filled(
        table,
        tuple(rows),
        {key: count for key, count in counts.items() if count},
        tuple(column.title for column in covered),
        tuple(problems),
        no_gap,
        demo,
    )


def _runs_of(table: Table, row: Row, results: Results, budgets: Budgets, demo: bool) -> _RowRuns:
    lacking, reading = unavailable(table, row), next_protocol_of(row, native_only=demo)
    runs = {
        column.key: results[column.task, column.protocol, reading]
        for column in table.columns
        if lacking is None and (column.task, column.protocol, reading) in results
    }
    return _RowRuns(row, arm_name(row, budgets), lacking, runs)


def _cell(table: Table, row: Row, key: str, measured: Measured | None, no_gap: str | None) -> Cell:
    """Return a cell with the row's own published figure, else that of the method in `against`."""
    if key in row.published or row.against is None:
        return Cell(row.published.get(key), measured, no_gap=no_gap)
    for other in table.rows:
        same = all(getattr(other, name) == getattr(row, name) for name in SETTING)
        if other.method == row.against and same and key in other.published:
            return Cell(other.published[key], measured, borrowed=True, no_gap=no_gap)
    return Cell(None, measured, no_gap=no_gap)


def _count(rows: Sequence[FilledRow], key: str) -> int:
    """Return how many items the figures of a column are over, 0 without one."""
    cells = (row.cells[key].measured for row in rows)
    return max((measured.n for measured in cells if measured), default=0)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that exist."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None
