"""From a table to runs: one run per task, all of its arms side by side.

What decides how a model reads an image (`mm_next_protocol`) belongs to the loaded model, so rows
that differ in it go to different runs, each with its own unpruned arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.eval.arm_words import arm_word
from llava.eval.engine.request import UNPRUNED
from llava.eval.tables.spec import Column, Row, Table
from llava.eval.tasks.base import list_benchmarks
from llava.pruning import list_methods

# Families that `load_pretrained_model` loads.
FAMILIES = ("llava-1.5", "llava-1.6")
DEFAULT_PROTOCOL = "native"

# Task, prompt protocol, reading of tiled images: what a run is about.
Place = tuple[str, str | None, str]


@dataclass(frozen=True)
class Setting:
    """One arm of a run, whatever rows it stands for.

    `budget` is a number of visual tokens if it is an integer, and a share of them if it is a float.
    """

    method: str
    budget: int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """As `--arm` of `python -m llava.eval run` takes it: `zoo:fusion=sum@64`."""
        return arm_word(self.method, self.budget, self.options)


@dataclass(frozen=True)
class Job:
    """One run: a task under one prompt protocol, with every arm that some row asks for."""

    task: str
    protocol: str | None
    next_protocol: str
    settings: tuple[Setting, ...]

    @property
    def place(self) -> Place:
        """Which cells it fills."""
        return self.task, self.protocol, self.next_protocol

    @property
    def folder(self) -> str:
        """Name of its output folder."""
        parts = [self.task, self.protocol, self.next_protocol]
        return "-".join(part for part in parts if part and part != DEFAULT_PROTOCOL)


Budgets = Callable[[Row], int | float | None]


def published_budget(row: Row) -> int | float | None:
    """The budget as the table prints it."""
    return row.budget


def scaled_budgets(table: Table, tokens: int) -> Budgets:
    """Budgets for a model of `tokens` visual tokens instead of the table's own number."""

    def scaled(row: Row) -> int | float | None:
        if row.keep_tokens is None or table.tokens is None:
            return row.budget
        return max(1, round(row.keep_tokens * tokens / table.tokens))

    return scaled


def setting_of(row: Row, budgets: Budgets = published_budget) -> Setting:
    """The arm that measures a row."""
    return Setting(row.method, budgets(row), row.options)


def next_protocol_of(row: Row, native_only: bool = False) -> str:
    """How the model of a row reads tiled images; `native_only` for a model without tiles."""
    return DEFAULT_PROTOCOL if native_only else row.next_protocol or DEFAULT_PROTOCOL


def unavailable(table: Table, row: Row) -> str | None:
    """The name of what a row needs and this package has not, or None."""
    if table.family not in FAMILIES:
        return table.family
    return None if row.method in list_methods() else row.method


def missing_tasks(table: Table) -> list[str]:
    """Tasks of the table that no benchmark is registered for."""
    known = list_benchmarks()
    return [task for task in dict.fromkeys(c.task for c in table.columns) if task not in known]


def plan(
    table: Table,
    budgets: Budgets = published_budget,
    native_only: bool = False,
    columns: Sequence[Column] | None = None,
) -> list[Job]:
    """The runs that fill the table, in column order; none for rows that are not available."""
    jobs = []
    rows = [row for row in table.rows if unavailable(table, row) is None]
    wanted = table.columns if columns is None else columns
    for task, protocol in dict.fromkeys((column.task, column.protocol) for column in wanted):
        for reading in dict.fromkeys(next_protocol_of(row, native_only) for row in rows):
            asked = [
                setting_of(row, budgets)
                for row in rows
                if next_protocol_of(row, native_only) == reading
            ]
            distinct = {setting.word: setting for setting in (Setting(UNPRUNED), *asked)}
            jobs.append(Job(task, protocol, reading, tuple(distinct.values())))
    return jobs
