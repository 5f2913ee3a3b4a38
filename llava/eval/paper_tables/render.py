"""A filled table as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from llava.eval.arm_words import spell_options
from llava.eval.paper_tables.collect import Cell, Filled, FilledRow, Measured
from llava.eval.paper_tables.spec import AVERAGE, Column, Published
from llava.eval.results import Record
from llava.eval.tables import markdown
from llava.storage import dump_json

NONE = "n/a"
DEMO = (
    "DEMO: llava-tiny on drawn scenes in the benchmarks' file formats. It was never trained on the "
    "benchmarks' prompts and gets most answers wrong. These figures show that every cell runs; "
    "they say nothing about the methods, or about the model and the data of the table."
)
BORROWED = "†"
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"  # of sources, by their place in the table
AVERAGE_TITLE = "Average %"
CSV_COLUMNS = (
    *("table", "method", "label", "options", "budget", "protocol", "column", "task", "prompt"),
    *("metric", "published", "source", "kind", "borrowed", "ours", "se", "n", "gap", "no_gap"),
)
Show = Callable[[Cell, Column | None], str]
Grid = tuple[list[str], list[list[str]]]


def to_markdown(filled: Filled, demo: bool = False) -> str:
    """The table for people: published / ours ± standard error / gap; a demo has no gaps."""
    parts = [f"# {filled.table.title}"]
    if demo:
        parts += [
            f"**{DEMO}**",
            markdown(*measured_grid(filled)),
            "Published figures of the real table, not comparable with the demo's:",
            markdown(*published_grid(filled)),
        ]
    else:
        parts += [
            "Cells: published / ours ± standard error / gap (ours minus published).",
            markdown(*full_grid(filled)),
        ]
    return "\n\n".join([*parts, *notes(filled, demo)]) + "\n"


def notes(filled: Filled, demo: bool = False) -> list[str]:
    """What the reader of the cells must know, one paragraph each."""
    table = filled.table
    found = [f"{mark} {text}." for mark, text in _source_lines(filled)]
    found += [
        f"n/a: {row.row.label} at {budget_text(row.budget)}: {row.refusal}."
        for row in filled.rows
        if row.refusal is not None
    ]
    if any(cell.borrowed for row in filled.rows for cell in _all_cells(row)):
        found.append(
            f"{BORROWED} Nobody published figures of this row's method: these are of the method it "
            "computes exactly, ZOO-Prune, at the same budget."
        )
    if filled.covered:
        found.append(
            f"{AVERAGE_TITLE}: retention, the mean over tasks of pruned / unpruned, here over "
            f"{len(filled.covered)}: {', '.join(filled.covered)}."
        )
    left_out = [c.title for c in table.averaged() if c.title not in filled.covered]
    if left_out:
        found.append(
            f"Not in the average, because a row or a score above zero to divide by is missing: "
            f"{', '.join(left_out)}."
        )
    if not demo and filled.no_gap:
        found.append(f"No gaps: {filled.no_gap}.")
    elif not demo:
        found += [
            f"No gap for {column.title}: {column.no_gap}."
            for column in table.columns
            if column.no_gap
        ]
        if table.average_no_gap:
            found.append(f"No gap for {AVERAGE_TITLE}: {table.average_no_gap}.")
    return [*found, *table.notes, *(f"Problem: {problem}" for problem in filled.problems)]


def to_latex(filled: Filled, demo: bool = False) -> str:
    """A `tabular` of the measured cells (booktabs), published ones beside them outside a demo."""
    header, body = measured_grid(filled) if demo else full_grid(filled)
    lines = [
        f"% {filled.table.title}{' (DEMO)' if demo else ''}; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        " & ".join(_tex(cell) for cell in header) + r" \\",
        "\\midrule",
        *(" & ".join(_tex(cell) for cell in line) + r" \\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    comments = [f"% {note}" for note in notes(filled, demo)]
    return "\n".join([*lines, *comments]) + "\n"


def to_csv(filled: Filled) -> str:
    """One line per cell, everything that is known about it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records(filled):
        published = record.pop("published") or {}
        ours = record.pop("ours") or {}
        flat = {"published": published.get("value"), "source": published.get("source")}
        flat |= {"kind": published.get("kind"), "ours": ours.get("value")}
        writer.writerow(record | flat | {"se": ours.get("se"), "n": ours.get("n")})
    return text.getvalue()


def to_json(filled: Filled, conditions: Record, demo: bool = False) -> str:
    """Everything as JSON: conditions, sources, cells."""
    table = filled.table
    content: Record = {
        "schema_version": 1,
        "table": table.name,
        "title": table.title,
        "demo": demo,
        "conditions": conditions,
        "average_covers": list(filled.covered),
        "samples": dict(filled.counts),
        "sources": {s.key: {"kind": s.kind, "text": s.text} for s in table.sources()},
        "problems": list(filled.problems),
        "rows": [
            {
                "label": row.row.label,
                "budget": row.budget,
                "protocol": row.next_protocol,
                "unavailable": row.unavailable,
                "refusal": row.refusal,
                "tokens": row.tokens,
                "ttft_ms": row.ttft_ms,
            }
            for row in filled.rows
        ],
        "cells": list(records(filled)),
    }
    return dump_json(content)


def records(filled: Filled) -> list[Record]:
    """One record per cell, averages included."""
    found = []
    for row in filled.rows:
        head: Record = {
            "table": filled.table.name,
            "method": row.row.method,
            "label": row.row.label,
            "options": spell_options(row.row.options),
            "budget": row.budget,
            "protocol": row.next_protocol,
        }
        for column in filled.table.columns:
            what = {"column": column.key, "task": column.task}
            what |= {"prompt": column.protocol, "metric": column.metric}
            found.append(head | what | _cell_record(row.cells[column.key]))
        average = {"column": AVERAGE, "task": None, "prompt": None, "metric": "retention"}
        found.append(head | average | _cell_record(row.average))
    return found


def _cell_record(cell: Cell) -> Record:
    published = cell.published and {
        "value": cell.published.value,
        "source": cell.published.source.key,
        "kind": cell.published.kind,
    }
    ours = cell.measured and {
        "value": cell.measured.value,
        "se": cell.measured.se,
        "n": cell.measured.n,
    }
    return {
        "published": published,
        "borrowed": cell.borrowed,
        "ours": ours,
        "gap": cell.gap,
        "no_gap": cell.no_gap,
    }


def full_grid(filled: Filled) -> Grid:
    """Published / ours / gap."""
    return _grid(filled, lambda cell, column: _full(filled, cell, column))


def measured_grid(filled: Filled) -> Grid:
    """What was measured here."""
    return _grid(filled, lambda cell, column: _ours(cell.measured, column))


def published_grid(filled: Filled) -> Grid:
    """What was published, without this run's counts of items and scaled budgets."""
    return _grid(filled, lambda cell, column: _theirs(filled, cell, column), published=True)


def _grid(filled: Filled, show: Show, published: bool = False) -> Grid:
    """Header and lines; `show(cell, column)` prints a cell, with column None for the average."""
    table = filled.table
    titled = [column.title for column in table.columns]
    if not published:
        counts = [filled.counts.get(column.key) for column in table.columns]
        titled = [
            f"{title} (n={n})" if n else title for title, n in zip(titled, counts, strict=True)
        ]
    protocols = len({row.next_protocol for row in filled.rows}) > 1
    header = ["method", "budget", *(["protocol"] if protocols else []), *titled]
    averaged = bool(table.averaged())
    header += [AVERAGE_TITLE] if averaged else []
    body = []
    for row in filled.rows:
        name = row.row.label
        if row.unavailable is not None:
            name += f" (not available: {row.unavailable})"
        budget = row.row.budget if published else row.budget
        line = [name, budget_text(budget), *([row.next_protocol] if protocols else [])]
        line += [show(row.cells[column.key], column) for column in table.columns]
        body.append(line + ([show(row.average, None)] if averaged else []))
    return header, body


def budget_text(budget: int | float | None) -> str:
    """`64` tokens, a share such as `20 %`, or `all` without a budget."""
    if budget is None:
        return "all"
    return f"{100 * budget:g} %" if isinstance(budget, float) else str(budget)


def _full(filled: Filled, cell: Cell, column: Column | None) -> str:
    if cell.published is None and cell.measured is None:
        return NONE
    gap = NONE if cell.gap is None else f"{cell.gap:+.{_digits(column)}f}"
    return f"{_theirs(filled, cell, column)} / {_ours(cell.measured, column)} / {gap}"


def _theirs(filled: Filled, cell: Cell, column: Column | None) -> str:
    if cell.published is None:
        return NONE
    mark = MARKS[filled.table.sources().index(cell.published.source)]
    return f"{_number(cell.published, column)}{mark}{BORROWED if cell.borrowed else ''}"


def _source_lines(filled: Filled) -> list[tuple[str, str]]:
    marked = zip(MARKS, filled.table.sources(), strict=False)
    return [(mark, f"{source.text} ({source.kind})") for mark, source in marked]


def _ours(measured: Measured | None, column: Column | None) -> str:
    if measured is None:
        return NONE
    digits = _digits(column)
    error = "" if measured.se is None else f" ± {measured.se:.{digits}f}"
    return f"{measured.value:.{digits}f}{error}"


def _number(published: Published, column: Column | None) -> str:
    return f"{published.value:.{_digits(column)}f}"


def _digits(column: Column | None) -> int:
    """Decimals as the field prints them: MME in points, speed-ups and retention finer."""
    if column is None:
        return 2
    if column.task == "mme":
        return 0
    return 2 if column.timed else 1


def _all_cells(row: FilledRow) -> Sequence[Cell]:
    return [*row.cells.values(), row.average]


def _tex(text: str) -> str:
    for sign in "&%_#$":
        text = text.replace(sign, f"\\{sign}")
    for digit, mark in enumerate(MARKS, start=1):
        text = text.replace(mark, f"$^{digit}$")
    return text.replace("±", r"$\pm$").replace(BORROWED, r"$^\dagger$")


def describe(conditions: Record) -> list[tuple[str, Any]]:
    """Conditions of a run as (name, text) pairs, for reports."""
    git, machine = conditions.get("git"), conditions["machine"]
    commit = f"{git['commit']}{' (with local changes)' if git['dirty'] else ''}" if git else NONE
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    return [
        ("command", conditions["command"]),
        ("model", conditions["model"]),
        ("data", conditions["data_root"]),
        ("commit", commit),
        ("versions", versions),
        ("machine", where),
    ]
