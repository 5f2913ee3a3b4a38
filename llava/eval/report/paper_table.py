"""A filled table of a paper as Markdown, HTML, LaTeX, CSV and JSON."""

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from llava.eval.engine.request import JOIN, spell_options
from llava.eval.engine.schema import Record
from llava.eval.report.result import describe_commit
from llava.eval.tables.fill import Cell, Filled, FilledRow
from llava.eval.tables.plan import printed_budget
from llava.eval.tables.spec import AVERAGE, Column, Row
from llava.markdown import table as markdown_table
from llava.pruning.decoder.registry import DECODER_METHODS
from llava.storage import dump_json

NONE = "n/a"
DEMO = (
    "DEMO: llava-tiny on drawn scenes in the benchmarks' file formats. It was never trained on the "
    "benchmarks' prompts and gets most answers wrong. These figures show that every cell runs; "
    "they say nothing about the methods, or about the model and the data of the table."
)
CELLS = "Cells: published / ours ± standard error / gap (ours minus published)."
PUBLISHED = "Published figures of the real table, not comparable with the demo's:"
MEASURED = (
    "measured: visual tokens of a prompt, the mean over questions and over the layers of the "
    "language model, where it is not the budget."
)
BORROWED = "†"
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"  # of sources, by their place in the table
AVERAGE_COLUMN = Column(AVERAGE, "Average %", task="", metric="retention")
# Figures in the record of a cell, which have several columns in a CSV file.
NESTED = {"published": ("value", "source", "kind"), "ours": ("value", "se", "n")}
# LaTeX for the characters that a cell may contain.
TEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%_#$"}
    | {mark: f"$^{digit}$" for digit, mark in enumerate(MARKS, start=1)}
    | {"±": r"$\pm$", BORROWED: r"$^\dagger$"}
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.absent td { color: #888 }
img { max-width: 100%; height: auto }
.demo { background: #fff3cd; border-left: .3rem solid #d39e00; padding: .6rem 1rem }
dt { font-weight: 600 }
dd { margin: 0 0 .4rem 1rem; overflow-wrap: anywhere }
figure { margin: 1rem 0 }
"""
Grid = tuple[list[str], list[list[str]]]  # header and lines of a printed table
Show = Callable[[Filled, Cell, Column], str]  # prints a cell


def to_markdown(filled: Filled) -> str:
    """Return the table for people: published / ours ± standard error / gap; a demo has no gaps."""
    parts = [f"# {filled.table.title}"]
    for text, grid in _grids(filled):
        parts += [f"**{text}**" if text == DEMO else text, markdown_table(*grid)]
    return "\n\n".join([*parts, *notes(filled)]) + "\n"


def to_html(filled: Filled, conditions: Record, pictures: Mapping[str, Path]) -> str:
    """Return one page that contains all it shows: tables, notes, pictures, conditions.

    `pictures` are PNG files by their captions.
    """
    title = escape(filled.table.title)
    body = [f"<h1>{title}</h1>"]
    for text, grid in _grids(filled):
        mark = ' class="demo"' if text == DEMO else ""
        body += [f"<p{mark}>{escape(text)}</p>", _html_table(filled.rows, *grid)]
    body += [f"<p>{escape(note)}</p>" for note in notes(filled)]
    for caption, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        body.append(f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>")
    body.append("<h2>Conditions</h2><dl>")
    for name, value in _printed(conditions).items():
        body.append(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>")
    body.append("</dl>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{page}\n</body></html>\n'


def _html_table(rows: Sequence[FilledRow], header: list[str], lines: list[list[str]]) -> str:
    found = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row, line in zip(rows, lines, strict=True):
        mark = ' class="absent"' if row.unavailable is not None else ""
        found.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>")
    return f'<div class="scroll"><table>{"".join(found)}</table></div>'


def _printed(conditions: Record) -> dict[str, str]:
    """Return conditions of a run as a page shows them."""
    versions, machine = (
        ", ".join(f"{name} {value}" for name, value in conditions[key].items())
        for key in ("versions", "machine")
    )
    return {
        "command": conditions["command"],
        "model": conditions["model"],
        "data": conditions["data_root"],
        "commit": describe_commit(conditions["git"]),
        "versions": versions,
        "machine": machine,
    }


def to_latex(filled: Filled) -> str:
    """Return a `tabular` (booktabs) of the first grid, with the notes as comments."""
    (_, (header, body)), *_ = _grids(filled)
    lines = [
        f"% {filled.table.title}{' (DEMO)' if filled.demo else ''}; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        _tex_line(header),
        "\\midrule",
        *map(_tex_line, body),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {note}" for note in notes(filled)),
    ]
    return "\n".join(lines) + "\n"


def _tex_line(cells: Sequence[str]) -> str:
    text = " & ".join(cell.translate(TEX) for cell in cells)
    return rf"{text} \\"


def to_csv(filled: Filled) -> str:
    """Return one line per cell with everything that is known about it."""
    text = io.StringIO()
    lines = [_flat(record) for record in records(filled)]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(record: Record) -> Record:
    """Return a record of a cell with its figures as columns of their own."""
    flat: Record = {}
    for key, value in record.items():
        for name in NESTED.get(key, ()):
            flat[key if name == "value" else name] = (value or {}).get(name)
        if key not in NESTED:
            flat[key] = value
    return flat


def to_json(filled: Filled, conditions: Record) -> str:
    """Return everything as JSON: conditions, sources, rows, cells."""
    table = filled.table
    content: Record = {
        "schema_version": 1,
        "table": table.name,
        "title": table.title,
        "demo": filled.demo,
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
        "cells": records(filled),
    }
    return dump_json(content)


def records(filled: Filled) -> list[Record]:
    """Return one record per cell, averages included."""
    columns = [*filled.table.columns, AVERAGE_COLUMN]
    return [_record(filled, row, column) for row in filled.rows for column in columns]


def _record(filled: Filled, row: FilledRow, column: Column) -> Record:
    cell = row.cell(column)
    published = cell.published and {
        "value": cell.published.value,
        "source": cell.published.source.key,
        "kind": cell.published.source.kind,
    }
    return {
        "table": filled.table.name,
        "method": row.row.methods,
        "label": row.row.label,
        "options": _options(row.row),
        "budget": row.budget,
        "protocol": row.next_protocol,
        "column": column.key,
        "task": column.task or None,
        "prompt": column.protocol,
        "metric": column.metric,
        "published": published,
        "borrowed": cell.borrowed,
        "ours": cell.measured and asdict(cell.measured),
        "gap": cell.gap,
        "no_gap": cell.no_gap,
        "arm": row.arm,
        "decoder": _decoder(row.row),
        "tokens_mean": row.tokens,
        "floor": cell.floor,
    }


def _options(row: Row) -> str:
    """Write the options of a row's methods, joined as in the name of an arm."""
    own = spell_options(row.options)
    if row.decoder is None or not row.decoder.options:
        return own
    return f"{own}{JOIN}{spell_options(row.decoder.options)}"


def _decoder(row: Row) -> str | None:
    """Name the method of a row that drops tokens between layers."""
    if row.decoder is not None:
        return row.decoder.method
    return row.method if row.method in DECODER_METHODS.entries() else None


def notes(filled: Filled) -> list[str]:
    """Return what the reader of the cells must know, one paragraph each."""
    table = filled.table
    marked = zip(MARKS, table.sources(), strict=False)
    found = [f"{mark} {source.text} ({source.kind})." for mark, source in marked]
    found += [
        f"n/a: {row.row.label} at {budget_text(row.budget)}: {row.refusal}."
        for row in filled.rows
        if row.refusal is not None
    ]
    if any(_off_budget(row) for row in filled.rows):
        found.append(MEASURED)
    if any(cell.borrowed for row in filled.rows for cell in (*row.cells.values(), row.average)):
        found.append(
            f"{BORROWED} No figures of this row's method were published: these are of the method "
            "that it computes exactly, ZOO-Prune, at the same budget."
        )
    if filled.covered:
        found.append(
            f"{AVERAGE_COLUMN.title}: retention, the mean over tasks of pruned / unpruned, here "
            f"over {len(filled.covered)}: {', '.join(filled.covered)}."
        )
    left_out = [c.title for c in table.averaged() if c.title not in filled.covered]
    if left_out:
        found.append(
            "Not in the average, because a figure is missing or the unpruned one is zero: "
            f"{', '.join(left_out)}."
        )
    if not filled.demo:
        reasons = [(column.title, column.no_gap) for column in table.columns]
        reasons.append((AVERAGE_COLUMN.title, table.average_no_gap))
        found += (
            [f"No gaps: {filled.no_gap}."]
            if filled.no_gap
            else [f"No gap for {title}: {reason}." for title, reason in reasons if reason]
        )
    return [*found, *table.notes, *(f"Problem: {problem}" for problem in filled.problems)]


def _grids(filled: Filled) -> list[tuple[str, Grid]]:
    """Return what is printed: one grid, two for a demo, each with a sentence about it."""
    if filled.demo:
        return [
            (DEMO, _grid(filled, _ours)),
            (PUBLISHED, _grid(filled, _theirs, published=True)),
        ]
    return [(CELLS, _grid(filled, _full))]


def _grid(filled: Filled, show: Show, published: bool = False) -> Grid:
    """Return header and lines. `published`: without this run's counts and scaled budgets."""
    table = filled.table
    columns = [*table.columns, *([AVERAGE_COLUMN] if table.averaged() else [])]
    counts = {} if published else filled.counts
    protocols = len({row.next_protocol for row in filled.rows}) > 1
    header = ["method", "budget", *(["protocol"] if protocols else [])]
    for column in columns:
        count = counts.get(column.key)
        header.append(f"{column.title} (n={count})" if count else column.title)
    body = []
    for row in filled.rows:
        lacking = "" if row.unavailable is None else f" (not available: {row.unavailable})"
        budget = budget_text(printed_budget(row.row)) if published else _budget(row)
        head = [row.row.label + lacking, budget, *([row.next_protocol] if protocols else [])]
        body.append(head + [show(filled, row.cell(column), column) for column in columns])
    return header, body


def _budget(row: FilledRow) -> str:
    """Return the budget that ran, and the mean that was measured where it is another."""
    nominal = budget_text(row.budget)
    return f"{nominal} (measured {row.tokens:.1f})" if _off_budget(row) else nominal


def _off_budget(row: FilledRow) -> bool:
    """Return whether a row did not keep the number of tokens that it names, to half a token."""
    if not isinstance(row.budget, int) or row.tokens is None:
        return False
    return abs(row.tokens - row.budget) > 0.5


def budget_text(budget: int | float | None) -> str:
    """Return `64` tokens, a share such as `20 %`, or `all` without a budget."""
    if budget is None:
        return "all"
    return f"{100 * budget:g} %" if isinstance(budget, float) else str(budget)


def _full(filled: Filled, cell: Cell, column: Column) -> str:
    if cell.published is None and cell.measured is None and cell.floor is None:
        return NONE
    gap = NONE if cell.gap is None else f"{cell.gap:+.{_digits(column)}f}"
    return f"{_theirs(filled, cell, column)} / {_ours(filled, cell, column)} / {gap}"


def _theirs(filled: Filled, cell: Cell, column: Column) -> str:
    if cell.published is None:
        return NONE
    mark = MARKS[filled.table.sources().index(cell.published.source)]
    value = f"{cell.published.value:.{_digits(column)}f}"
    return f"{value}{mark}{BORROWED if cell.borrowed else ''}"


def _ours(filled: Filled, cell: Cell, column: Column) -> str:
    if cell.measured is None:
        return NONE if cell.floor is None else f"floor {cell.floor}"
    digits, se = _digits(column), cell.measured.se
    return f"{cell.measured.value:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def _digits(column: Column) -> int:
    """Return decimals as the field prints them: MME in points, speed-ups and retention finer."""
    if column.task == "mme":
        return 0
    return 2 if column.timed or column is AVERAGE_COLUMN else 1
