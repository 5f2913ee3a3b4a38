"""Markdown tables from result files, and the check that README and docs still show them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.eval.arms import UNPRUNED
from llava.eval.results import Record, read_result
from llava.generated import fill_sections, read_markdown
from llava.storage import write_atomically
from llava.utils import UserInputError

# Rows of the README's table: baselines, the paper's method and its relatives, one of every family.
SHORT = (
    "none",
    "random",
    "grid",
    "pool",
    "norm",
    "divprune",
    "zoo",
    "zoo-exact",
    "cdpruner",
    "fopru",
    "visionzip",
    "vispruner",
)

LEGEND = """\
*tokens*: visual tokens spliced into the language model's input, counted there (lowest..highest over
the questions where they differ). *accuracy*: exact match of the freely generated answer, in per
cent, ± standard error clustered by image. *of unpruned*: that accuracy over the unpruned one.
*difference*: paired by question, in points, ± its own standard error. *prune*: score + select +
gather for one image, as a fraction of the unpruned prefill of one question. *prefill*: forward pass
over the prompt up to the first new token, over the same for the unpruned model. Both are medians
over batches of ratios taken within a batch, with all arms run one after another on that batch.
`least-sensitive` keeps the tokens `zoo-exact` would rank last; `shuffled image` shows the model
another question's image; `no image` removes the image from the prompt."""


SUMMARY_LEGEND = (
    "Accuracy in per cent ± standard error, by visual tokens of an image; methods in the order of "
    "the run, controls last:"
)


def render(result: Record) -> str:
    """One line per method, the main table, its legend and the table per family, as Markdown."""
    parts = [SUMMARY_LEGEND, summary_table(result), *_settings(result), family_table(result)]
    return "\n\n".join(parts) + "\n"


def _settings(result: Record) -> list[str]:
    return [main_table(result), *notes(result), LEGEND]


def notes(result: Record) -> list[str]:
    """Why cells of the main table are empty, one paragraph for each method and reason."""
    budgets: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["unavailable"]:
            reason = row["label"], row["unavailable"]
            budgets.setdefault(reason, []).append(_count(row["budget"]))
    return [
        f"n/a: {label} at {', '.join(own)}: {reason}." for (label, reason), own in budgets.items()
    ]


def summary_table(result: Record) -> str:
    """One line per method and control, in the order of the run: accuracy at every budget."""
    lines: dict[tuple[str, str | None], dict[int | None, str]] = {}
    for row in result["rows"]:
        shown = "n/a" if row["unavailable"] else _percent(row["accuracy"], row["accuracy_se"])
        lines.setdefault((row["label"], row["control"]), {})[row["budget"]] = shown
    budgets = sorted({row["budget"] for row in result["rows"] if row["budget"]}, reverse=True)
    columns = [*budgets, None] if any(None in cells for cells in lines.values()) else budgets
    header = ["method", *("0" if budget is None else str(budget) for budget in columns)]
    body = [
        [label, *(cells.get(budget, "") for budget in columns)]
        for (label, _), cells in lines.items()
    ]
    return markdown(header, body)


def main_table(result: Record) -> str:
    """One line per arm: tokens, accuracy, difference to the unpruned model, time ratios."""
    header = [
        "method",
        "budget",
        "tokens",
        "accuracy",
        "of unpruned",
        "difference",
        "prune",
        "prefill",
    ]
    body = [_main_line(row) for row in result["rows"]]
    return markdown(header, body)


def family_table(result: Record) -> str:
    """One line per arm: accuracy per question family in per cent ± standard error."""
    rows = [row for row in result["rows"] if not row["unavailable"]]
    names = list(rows[0]["families"])
    counts = rows[0]["families"]
    header = ["method", "budget", *(f"{name} (n={counts[name]['n']})" for name in names)]
    body = []
    for row in rows:
        cells = [row["families"][name] for name in names]
        shown = [_percent(cell["accuracy"], cell["accuracy_se"]) for cell in cells]
        body.append([row["label"], _count(row["budget"]), *shown])
    return markdown(header, body)


def filled(file: Path, result: Record) -> str:
    """The text of a Markdown file with `result` in the generated sections that it has."""
    sections = {"llava-tiny": full_section, "llava-tiny-short": short_section}
    return fill_sections(file, {name: partial(make, result) for name, make in sections.items()})


def short_section(result: Record) -> str:
    """The summary of a dozen methods, for the README."""
    rows = [row for row in result["rows"] if row["method"] in SHORT and not row["control"]]
    return summary_table(result | {"rows": rows}) + "\n"


def full_section(result: Record) -> str:
    """Everything about a tracked result file: conditions, summary, long tables folded."""
    run = result["run"]
    git = run["git"]
    commit = git["commit"][:10] + (" (with local changes)" if git["dirty"] else "") if git else "?"
    versions = run["versions"]
    machine = run["machine"]
    conditions = (
        f"{result['questions']} questions about {result['images']} images, batch size "
        f"{result['config']['batch_size']}, {machine['device']} with {machine['torch_threads']} "
        f"thread(s), torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit {commit}. Made by `{run['command']}`."
    )
    parts = [
        conditions,
        SUMMARY_LEGEND,
        summary_table(result),
        *_folded("Every setting: tokens, paired difference, time", _settings(result)),
        *_folded("Accuracy per question family", [family_table(result)]),
    ]
    return "\n\n".join(parts) + "\n"


def _folded(title: str, parts: Sequence[str]) -> list[str]:
    """Markdown that a page shows when its title is opened."""
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def drift(file: Path, result: Path) -> str | None:
    """Why the generated sections of `file` are not what `result` renders to, or None."""
    try:
        if filled(file, read_result(result)) == read_markdown(file):
            return None
    except UserInputError as error:
        return str(error)
    fix = f"llava table {result} --update {file}"
    return f"the tables in {file} are not those of {result}; run {fix}"


def update(file: Path, result: Path) -> None:
    """Write the rendered `result` between the markers of `file`.

    Raises:
        UserInputError: one of the two cannot be read, or the file has no such markers.
    """
    write_atomically(file, filled(file, read_result(result)))


def _main_line(row: dict[str, Any]) -> list[str]:
    start = [row["label"], _count(row["budget"])]
    if row["unavailable"]:
        return [*start, *["n/a"] * 6]
    low, high = row["tokens_min"], row["tokens_max"]
    difference = _percent(row["difference"], row["difference_se"], sign="+")
    return [
        *start,
        str(low) if low == high else f"{low}..{high}",
        _percent(row["accuracy"], row["accuracy_se"]),
        "n/a" if row["relative"] is None else f"{100 * row['relative']:.1f} %",
        "—" if row["arm"] == UNPRUNED else difference,
        _ratio(row["prune_ratio"]),
        _ratio(row["prefill_ratio"]),
    ]


def _percent(value: float, se: float | None, sign: str = "") -> str:
    error = "n/a" if se is None else f"{100 * se:.1f}"
    return f"{100 * value:{sign}.1f} ± {error}"


def _ratio(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def _count(value: int | None) -> str:
    return "—" if value is None else str(value)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded, so that it reads as well in a terminal."""
    lines = [list(header), *map(list, body)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    if len(widths) > 1:
        rule[1:] = [f"{'-' * (width - 1)}:" for width in widths[1:]]
    padded = [
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
