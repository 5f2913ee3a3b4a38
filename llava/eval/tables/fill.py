"""From finished runs to cells: what was measured, next to what was published."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava.eval.engine.request import UNPRUNED
from llava.eval.tables.plan import (
    Budgets,
    Place,
    Setting,
    next_protocol_of,
    setting_of,
    unavailable,
)
from llava.eval.tables.spec import AVERAGE, Column, Published, Row, Table, TableError


@dataclass(frozen=True)
class Measured:
    """A figure of one run: value, standard error (None: undefined), number of items."""

    value: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """One cell. `gap` is measured minus published, None with a reason in `no_gap`.

    `borrowed` marks a published figure of the method that the row is held against.
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


@dataclass(frozen=True)
class Filled:
    """A table with everything that is known about its cells.

    `counts`: items per column key. `covered`: titles of the columns that the average takes in.
    `problems`: what did not run or not wholly, one line each. `no_gap`: see `fill`.
    """

    table: Table
    rows: tuple[FilledRow, ...]
    counts: Mapping[str, int]
    covered: tuple[str, ...]
    problems: tuple[str, ...] = ()
    no_gap: str | None = None


@dataclass(frozen=True)
class RunResult:
    """`metrics.json` and `timings.jsonl` of a finished run."""

    arms: Mapping[str, Mapping[str, Any]]
    timings: Sequence[Mapping[str, Any]]

    def arm(self, setting: Setting) -> Mapping[str, Any] | None:
        """What was measured under `setting`; None if no arm has it."""
        return self.arms.get(setting.word)

    def figure(self, setting: Setting, column: Column) -> Measured | None:
        arm = self.arm(setting)
        if arm is None:
            return None
        if column.timed:
            return self.time(setting, column.metric)
        metric = arm["metrics"].get(column.metric)
        return None if metric is None else Measured(metric["value"], metric["se"], metric["n"])

    def time(self, setting: Setting, metric: str) -> Measured | None:
        """Median over batches, the first of a process left out; speed-ups are paired by batch."""
        own, base = (self._times(word) for word in (setting.word, UNPRUNED))
        which, kind = metric.split("_")
        values = [times[which] for times in own.values()]
        if kind == "speedup":
            values = [base[b][which] / own[b][which] for b in own.keys() & base.keys()]
        return Measured(median(values), None, len(values)) if values else None

    def _times(self, word: str) -> dict[int, dict[str, float]]:
        lines = [line for line in self.timings if line["arm"] == word]
        lines = [line for line in lines if not line["cold"]] or lines
        return {line["batch"]: _totals(line) for line in lines}


def _totals(line: Mapping[str, Any]) -> dict[str, float]:
    """ms per question up to the first token (`ttft`) and to the end of the answer (`total`).

    Tables of answer times run one question at a time, so the tokens of a batch are the answer's;
    the token after the last one ends it, so there is one decoding step per token.
    """
    parts = ("encode_ms", "prune_ms", "splice_ms", "prefill_ms")
    first = math.fsum(line[part] or 0.0 for part in parts)
    return {"ttft": first, "total": first + line["new_tokens"] * (line["decode_ms"] or 0.0)}


def read_run(folder: Path) -> RunResult:
    """The files of a finished run. Raises TableError if it is not one."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = (folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()
        return RunResult(metrics["arms"], [json.loads(line) for line in lines])
    except OSError as error:
        raise TableError(f"{folder} holds no finished run: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{folder} holds no finished run: {error!r}") from error


Results = Mapping[Place, RunResult]


def fill(
    table: Table,
    results: Results,
    budgets: Budgets,
    *,
    native_only: bool = False,
    no_gap: str | None = None,
    problems: Sequence[str] = (),
) -> Filled:
    """Put every measured figure beside the published one.

    `no_gap` says why no figure of these runs can be held against a published one: a demo's model
    and data, the first few questions of a task.
    """

    def result_of(row: Row, column: Column) -> RunResult | None:
        reading = next_protocol_of(row, native_only)
        return results.get((column.task, column.protocol, reading))

    def measured(row: Row, column: Column, unpruned: bool = False) -> Measured | None:
        result = result_of(row, column)
        if result is None or unavailable(table, row) is not None:
            return None
        setting = Setting(UNPRUNED) if unpruned else setting_of(row, budgets)
        return result.figure(setting, column)

    def refusal(row: Row) -> str | None:
        for column in table.columns:
            result = result_of(row, column)
            arm = result and result.arm(setting_of(row, budgets))
            if arm and arm.get("unavailable"):
                return str(arm["unavailable"])
        return None

    open_rows = [
        row for row in table.rows if unavailable(table, row) is None and refusal(row) is None
    ]
    covered = [column for column in table.averaged() if _covers(column, open_rows, measured)]
    complete = bool(covered) and covered == table.averaged()
    why_not = None if complete else "the average does not cover every task of the table"
    rows = []
    for row in table.rows:
        cells = {}
        for column in table.columns:
            published, borrowed = _published(table, row, column.key)
            reason = no_gap or column.no_gap
            cells[column.key] = Cell(published, measured(row, column), borrowed, reason)
        average = None
        if covered and row in open_rows:
            ratios = [
                _ratio(measured(row, column), measured(row, column, unpruned=True))
                for column in covered
            ]
            average = Measured(100 * math.fsum(ratios) / len(ratios), None, len(ratios))
        published, borrowed = _published(table, row, AVERAGE)
        reason = no_gap or table.average_no_gap or why_not
        rows.append(
            FilledRow(
                row,
                budgets(row),
                next_protocol_of(row, native_only),
                cells,
                Cell(published, average, borrowed, reason),
                unavailable(table, row),
                refusal(row),
                *_plot_figures(table, row, budgets, result_of),
            )
        )
    counts = _counts(table, rows)
    titles = tuple(column.title for column in covered)
    return Filled(table, tuple(rows), counts, titles, tuple(problems), no_gap)


def _covers(column: Column, rows: Sequence[Row], measured: Any) -> bool:
    """Whether every row has a figure in `column`, and an unpruned one above zero to divide by."""
    for row in rows:
        base, own = measured(row, column, unpruned=True), measured(row, column)
        if base is None or own is None or base.value <= 0:
            return False
    return bool(rows)


def _ratio(own: Measured | None, base: Measured | None) -> float:
    assert own is not None and base is not None  # the column is covered
    return own.value / base.value


def _published(table: Table, row: Row, key: str) -> tuple[Published | None, bool]:
    """The row's own published figure, else that of the method it is held against."""
    if key in row.published or row.against is None:
        return row.published.get(key), False
    for other in table.rows:
        budgets = [(each.keep_tokens, each.keep_ratio) for each in (row, other)]
        same = other.method == row.against and budgets[0] == budgets[1]
        if same and other.next_protocol == row.next_protocol and key in other.published:
            return other.published[key], True
    return None, False


def _plot_figures(
    table: Table, row: Row, budgets: Budgets, result_of: Any
) -> tuple[float | None, float | None]:
    """(visual tokens, ms to the first token) of a row: means over the table's runs."""
    if unavailable(table, row) is not None:
        return None, None
    setting = setting_of(row, budgets)
    found: dict[str, list[float]] = defaultdict(list)
    seen = []
    for column in table.columns:
        result = result_of(row, column)
        arm = None if result is None else result.arm(setting)
        if arm is None or result in seen:
            continue
        seen.append(result)
        if arm.get("tokens_mean") is not None:
            found["tokens"].append(arm["tokens_mean"])
        first = result.time(setting, "ttft_ms")
        if first is not None:
            found["ttft"].append(first.value)
    return _mean(found["tokens"]), _mean(found["ttft"])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _counts(table: Table, rows: Sequence[FilledRow]) -> dict[str, int]:
    counts = {}
    for column in table.columns:
        found = [cell.n for row in rows if (cell := row.cells[column.key].measured)]
        if found:
            counts[column.key] = max(found)
    return counts
