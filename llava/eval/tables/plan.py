"""From a table to runs: one run per task, all of its arms side by side.

What decides how a model reads an image (`mm_next_protocol`) belongs to the loaded model, so rows
that differ in it go to different runs, each with its own unpruned arm.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llava.eval.engine.request import (
    UNPRUNED,
    Arm,
    arm_of,
    arm_word,
    join_words,
    make_arm,
    make_decoder,
)
from llava.eval.tables.spec import Row, Table, Within
from llava.eval.tasks.base import list_benchmarks
from llava.pruning import list_methods, lookup
from llava.pruning.decoder.registry import list_decoder_methods

# LLaVA's own; the others are called as in `llava.families`.
FAMILIES = ("llava-1.5", "llava-1.6")
DEFAULT_PROTOCOL = "native"

# Task, prompt protocol, reading of tiled images: what a run is about.
Place = tuple[str, str | None, str]


@dataclass(frozen=True)
class Job:
    """One run: a task under one prompt protocol, with every arm that some row asks for."""

    task: str
    protocol: str | None
    next_protocol: str
    arms: tuple[Arm, ...]

    @property
    def place(self) -> Place:
        """What decides which cells the run fills."""
        return self.task, self.protocol, self.next_protocol

    @property
    def folder(self) -> str:
        """Name of its output folder."""
        return "-".join(part for part in self.place if part and part != DEFAULT_PROTOCOL)


Budgets = Callable[[Row | Within], int | float | None]


def published_budget(row: Row | Within) -> int | float | None:
    """Return the budget as the table has it."""
    return row.budget


def printed_budget(row: Row, budgets: Budgets = published_budget) -> int | float | None:
    """Return the budget that a table prints: where layers drop tokens too, their mean."""
    return budgets(row if row.decoder is None else row.decoder)


def scaled_budgets(table: Table, tokens: int) -> Budgets:
    """Make budgets for a model of `tokens` visual tokens instead of the table's own number."""

    def scaled(row: Row | Within) -> int | float | None:
        if row.keep_tokens is None or table.tokens is None:
            return row.budget
        return max(1, round(row.keep_tokens * tokens / table.tokens))

    return scaled


def arm_name(row: Row, budgets: Budgets = published_budget) -> str:
    """Return the name of the arm that measures a row: `zoo:fusion=sum@64`."""
    word = arm_word(row.method, budgets(row), row.options)
    if row.decoder is None:
        return word
    after = arm_word(row.decoder.method, budgets(row.decoder), row.decoder.options)
    return join_words(word, after)


def arm_for(row: Row, budgets: Budgets = published_budget) -> Arm:
    """Return the arm that measures a row.

    Raises:
        UserInputError: its setting does not exist.
    """
    decoder = None
    if row.decoder is not None:
        decoder = make_decoder(row.decoder.method, budgets(row.decoder), row.decoder.options)
    return make_arm(arm_name(row, budgets), row.method, budgets(row), row.options, decoder)


def next_protocol_of(row: Row, native_only: bool = False) -> str:
    """Return the tile protocol of a row; `native_only` for a model without tiles."""
    return DEFAULT_PROTOCOL if native_only else row.next_protocol or DEFAULT_PROTOCOL


def unavailable(table: Table, row: Row) -> str | None:
    """Return the name of what a row needs and this package does not have, or None."""
    if table.family not in (*FAMILIES, *lookup.FAMILIES.entries()):
        return table.family
    within = list_decoder_methods()
    if row.method not in (*list_methods(), *within):
        return row.method
    if row.decoder is not None and row.decoder.method not in within:
        return row.decoder.method
    return None


def missing_tasks(table: Table) -> list[str]:
    """Return the tasks of the table that no benchmark is registered for."""
    known = list_benchmarks()
    return [task for task in dict.fromkeys(c.task for c in table.columns) if task not in known]


def plan(table: Table, budgets: Budgets = published_budget, native_only: bool = False) -> list[Job]:
    """Plan the runs that fill the table, in column order; none for rows that are not available.

    Raises:
        UserInputError: a row with a setting that does not exist.
    """
    groups: dict[str, dict[str, Arm]] = {}  # arms by tile protocol and name
    for row in table.rows:
        if unavailable(table, row) is None:
            arm = arm_for(row, budgets)
            reading = next_protocol_of(row, native_only)
            groups.setdefault(reading, {UNPRUNED: arm_of(None)})[arm.name] = arm
    return [
        Job(task, protocol, reading, tuple(arms.values()))
        for task, protocol in dict.fromkeys((own.task, own.protocol) for own in table.columns)
        for reading, arms in groups.items()
    ]
