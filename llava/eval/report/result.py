"""Markdown tables of a result file, as quickstart prints them and as README and docs show them."""

from contextlib import suppress
from pathlib import Path

from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.schema import Record, read_result
from llava.markdown import fill_sections, find_drift, table
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

# Where a row drops tokens between layers.
WITHIN = """\
Methods that drop tokens between layers of the language model, alone or behind another as in
`zoo@192+fastv`: their budget and their tokens are means over layers. `floor 144`: the layers before
the first cut alone read so many in the mean, so that the budget cannot be reached."""

SUMMARY = (
    "Accuracy in per cent ± standard error, by visual tokens of an image; methods in the order of "
    "the run, controls last:"
)
COLUMNS = (
    "method",
    "budget",
    "tokens",
    "accuracy",
    "of unpruned",
    "difference",
    "prune",
    "prefill",
)


def render(result: Record) -> str:
    """Return the summary, the main table with its legend, and the table per family."""
    parts = [SUMMARY, summary_table(result), *_settings(result), family_table(result)]
    return "\n\n".join(parts) + "\n"


def _settings(result: Record) -> list[str]:
    within = any("between_layers" in row or "floor" in row for row in result["rows"])
    return [main_table(result), *notes(result), LEGEND, *([WITHIN] if within else [])]


def notes(result: Record) -> list[str]:
    """Say why cells of the main table are empty, one paragraph for each method and reason."""
    budgets: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["unavailable"]:
            reason = row["label"], row["unavailable"]
            budgets.setdefault(reason, []).append(_or_dash(row["budget"]))
    return [
        f"n/a: {label} at {', '.join(own)}: {reason}." for (label, reason), own in budgets.items()
    ]


def summary_table(result: Record) -> str:
    """Return one line per method and control, in the order of the run: accuracy at each budget."""
    lines: dict[tuple[str, str | None], dict[int | None, str]] = {}
    for row in result["rows"]:
        shown = _absent(row) if row["unavailable"] else _accuracy(row)
        lines.setdefault((row["label"], row["control"]), {})[row["budget"]] = shown
    # 0 is the arm without an image, which has no budget.
    budgets = sorted({budget or 0 for cells in lines.values() for budget in cells}, reverse=True)
    body = [
        [label, *(cells.get(budget or None, "") for budget in budgets)]
        for (label, _), cells in lines.items()
    ]
    return table(["method", *map(str, budgets)], body)


def main_table(result: Record) -> str:
    """Return one line per arm: tokens, accuracy, difference to the unpruned model, time ratios."""
    return table(COLUMNS, [_main_line(row) for row in result["rows"]])


def _main_line(row: Record) -> list[str]:
    start = [row["label"], _or_dash(row["budget"])]
    if row["unavailable"]:
        return [*start, _absent(row), *["n/a"] * (len(COLUMNS) - 3)]
    difference = _percent(row["difference"], row["difference_se"], sign="+")
    return [
        *start,
        _tokens(row),
        _accuracy(row),
        "n/a" if row["relative"] is None else f"{100 * row['relative']:.1f} %",
        "—" if row["arm"] == UNPRUNED else difference,
        _or_dash(row["prune_ratio"], ".2f"),
        _or_dash(row["prefill_ratio"], ".2f"),
    ]


def _absent(row: Record) -> str:
    """Say what stands for the figure of an arm that was not run."""
    return f"floor {row['floor']}" if row.get("floor") else "n/a"


def _tokens(row: Record) -> str:
    """Write the visual tokens of a prompt; where layers drop some, their mean over layers."""
    if "between_layers" in row:
        return f"{row['between_layers']['tokens_mean']:.1f}"
    low, high = row["tokens_min"], row["tokens_max"]
    return str(low) if low == high else f"{low}..{high}"


def family_table(result: Record) -> str:
    """Return one line per arm: accuracy per question family in per cent ± standard error."""
    rows = [row for row in result["rows"] if not row["unavailable"]]
    families = rows[0]["families"]
    header = ["method", "budget", *(f"{name} (n={of['n']})" for name, of in families.items())]
    body = [
        [
            row["label"],
            _or_dash(row["budget"]),
            *(_accuracy(row["families"][name]) for name in families),
        ]
        for row in rows
    ]
    return table(header, body)


def short_section(result: Record) -> str:
    """Return the summary of a dozen methods, for the README."""
    rows = [row for row in result["rows"] if row["method"] in SHORT and not row["control"]]
    return summary_table(result | {"rows": rows}) + "\n"


def full_section(result: Record) -> str:
    """Return everything about a result file: conditions, summary, long tables folded."""
    run = result["run"]
    versions, machine = run["versions"], run["machine"]
    conditions = (
        f"{result['questions']} questions about {result['images']} images, batch size "
        f"{result['config']['batch_size']}, {machine['device']} with {machine['torch_threads']} "
        f"thread(s), torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit {describe_commit(run['git'], digits=10)}. Made by `{run['command']}`."
    )
    parts = [
        conditions,
        SUMMARY,
        summary_table(result),
        *_fold("Every setting: tokens, paired difference, time", *_settings(result)),
        *_fold("Accuracy per question family", family_table(result)),
    ]
    return "\n\n".join(parts) + "\n"


def _fold(title: str, *parts: str) -> list[str]:
    """Hide parts until a reader opens their title."""
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def describe_commit(git: Record | None, digits: int = 40) -> str:
    """Return the first digits of a commit and whether the checkout had changes; `?` without git."""
    if git is None:
        return "?"
    return git["commit"][:digits] + (" (with local changes)" if git["dirty"] else "")


def drift(file: Path, result: Path) -> str | None:
    """Return why the sections of `file` that show `result` are out of date, or None.

    Raises:
        UserInputError: one of the two cannot be read, or the file has no such sections.
    """
    return find_drift(file, _sections(file, result), f"llava table {result} --update {file}")


def update(file: Path, result: Path) -> None:
    """Write `result` between the markers of `file`.

    Raises:
        UserInputError: as in `drift`.
    """
    write_atomically(file, fill_sections(file, _sections(file, result)))


def _sections(file: Path, result: Path) -> dict[str, str]:
    """Make the sections that are called like the result; without one, those of llava-tiny."""
    makers = {"llava-tiny": full_section, "llava-tiny-short": short_section}
    if result.stem not in makers:
        with suppress(UserInputError):  # it has none; the sections of llava-tiny are asked for
            fill_sections(file, {result.stem: ""})
            makers = {result.stem: full_section}
    fill_sections(file, dict.fromkeys(makers, ""))  # refuses a file without them first
    content = read_result(result)
    return {name: make(content) for name, make in makers.items()}


def _accuracy(cell: Record) -> str:
    return _percent(cell["accuracy"], cell["accuracy_se"])


def _percent(value: float, se: float | None, sign: str = "") -> str:
    error = "n/a" if se is None else f"{100 * se:.1f}"
    return f"{100 * value:{sign}.1f} ± {error}"


def _or_dash(value: float | None, form: str = "") -> str:
    return "—" if value is None else format(value, form)
