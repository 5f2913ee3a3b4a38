"""The catalogue of methods: what the classes say of themselves, what papers and we measured."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from llava.markdown import fill_sections, table
from llava.pruning.decoder.method import DecoderMethod
from llava.pruning.decoder.registry import get_decoder_method, list_decoder_methods
from llava.pruning.decoder.schedule import PUBLISHED_DEPTH, UnreachableBudgetError
from llava.pruning.errors import PruningError
from llava.pruning.registry import get_method, list_methods
from llava.shipped import shipped_path

SECTION = "methods"  # between the markers of docs/methods.md
RESULTS = "results/llava-tiny.json"  # below playground
COLUMNS = (
    *("method", "signal", "needs", "query-aware", "merges", "fidelity"),
    *("published %", "llava-tiny %", "paper"),
)
DECODER_COLUMNS = (
    *("method", "stage", "signal", "fidelity", "options"),
    *("mean without a budget", "lowest mean", "published %", "paper"),
)
DECODER_HEADING = "Methods that drop tokens between the layers of the language model:"
IMAGE_TOKENS = 576  # of LLaVA-1.5, which all these figures are of
MISSING = "n/a"


_published = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
KEEP_TOKENS: int = _published["keep_tokens"]


class Source(NamedTuple):
    """A table of a paper: `where` it is, who ran it (`kind`), and what it `averages`."""

    where: str
    kind: str
    averages: str


class Retention(NamedTuple):
    """`percent` of the unpruned score in `source`, a key of SOURCES.

    `setting` says which options, `keep_tokens` which budget.
    """

    percent: float
    source: str
    setting: str = ""
    keep_tokens: int = KEEP_TOKENS


SOURCES = {name: Source(**about) for name, about in _published["sources"].items()}
RETENTION = {
    name: tuple(Retention(**figure) for figure in figures)
    for name, figures in _published["retention"].items()
}


def method_table(measured: dict[str, str] | None = None) -> list[tuple[str, ...]]:
    """Return one row per registered method, in the order of COLUMNS; `measured` as of `figures`."""
    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        cls = get_method(name)
        wants = (f"({name})" for name in cls.wants)
        needs = ", ".join([*cls.needs, *wants]) or "-"
        aware, merges = ("yes" if flag else "no" for flag in (cls.query_aware, cls.merges))
        ours = (measured or {}).get(name, MISSING)
        facts = (cls.signal or "-", needs, aware, merges, cls.fidelity)
        rows.append((name, *facts, published(name), ours, cls.paper or "-"))
    return rows


def decoder_table() -> list[tuple[str, ...]]:
    """Return one row per registered decoder method, in the order of DECODER_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for name in list_decoder_methods():
        cls = get_decoder_method(name)
        facts = (cls.stage, cls.signal or "-", cls.fidelity, _options(cls) or "-")
        rows.append((name, *facts, *_means(cls), published(name), cls.paper or "-"))
    return rows


def _options(cls: type[DecoderMethod]) -> str:
    """List options, with their defaults where there is something to show."""
    names = []
    for field in fields(cls):
        shown = field.default not in (None, NO_DEFAULT)
        value = field.default
        if isinstance(value, tuple):
            value = "+".join(map(str, value))
        if field.init:
            names.append(f"{field.name}={value}" if shown else field.name)
    return ", ".join(names)


def _means(cls: type[DecoderMethod]) -> tuple[str, str]:
    """Return the mean over layers of the published schedule, and the lowest budget there is."""
    try:
        method = cls()
    except PruningError:  # it needs an option, such as a file
        return MISSING, MISSING
    own, lowest = MISSING, "1"
    if not method.budgeted:
        schedule = method.plan(IMAGE_TOKENS, PUBLISHED_DEPTH, None)
        own = f"{schedule.mean(IMAGE_TOKENS, PUBLISHED_DEPTH):.0f}"
    try:
        method.plan(IMAGE_TOKENS, PUBLISHED_DEPTH, 1)
    except UnreachableBudgetError as error:
        lowest = str(error.floor)
    return own, lowest


def published(name: str) -> str:
    """Return what papers report of a method, each figure with its source's number; or n/a."""
    numbers = {source: number for number, source in enumerate(SOURCES, start=1)}
    cells = []
    for figure in RETENTION.get(name, ()):
        other = figure.keep_tokens != KEEP_TOKENS
        notes = [figure.setting] if figure.setting else []
        notes += [f"{figure.keep_tokens} tokens"] if other else []
        note = f" ({', '.join(notes)})" if notes else ""
        cells.append(f"{figure.percent:.1f} [{numbers[figure.source]}]{note}")
    return ", ".join(cells) or MISSING


def legend(results: Path | None) -> str:
    """Explain the two columns of figures, and list the sources by number."""
    if results is None:
        ours = f"no result file was read, so it is {MISSING} everywhere"
    else:
        ours = f"from `{results.name}`; {MISSING} where that run did not have the method"
    lines = [
        f"*published %*: mean over benchmarks of pruned score / unpruned score on LLaVA-1.5-7B at "
        f"{KEEP_TOKENS} of {IMAGE_TOKENS} tokens, or as many as parentheses say, as reported; "
        f"{MISSING} where we know of no report. Figures compare only inside one source, because "
        "each averages other benchmarks:",
        "",
        *(
            f"{number}. {source.where}: {source.kind}; mean of {source.averages}."
            for number, source in enumerate(SOURCES.values(), start=1)
        ),
        "",
        f"*llava-tiny %*: accuracy on the model in this repository at {KEEP_TOKENS} of 576 tokens "
        f"± standard error, {ours}. Parentheses: the setting, where it is not the plain method.",
        "",
        "*mean without a budget*, *lowest mean*: visual tokens that a layer reads on average, of "
        f"{IMAGE_TOKENS}, in a model of {PUBLISHED_DEPTH} layers and with the default options; "
        f"{MISSING} where a budget or a file must be given.",
    ]
    return "\n".join(lines)


def render(markdown: bool, results: Path | None = None) -> str:
    """Return both tables as aligned text, or as Markdown with their legend.

    Args:
        markdown: which of the two.
        results: result file with our figures, None for none.

    Raises:
        PruningError: the file has no figures.
    """
    lines = method_table(None if results is None else figures(results))
    tables = ((COLUMNS, lines), (DECODER_COLUMNS, decoder_table()))
    if markdown:
        before, between = (table(columns, rows, aligned=False) for columns, rows in tables)
        return f"{before}\n\n{DECODER_HEADING}\n\n{between}\n\n{legend(results)}"
    return "\n\n".join(_aligned([columns, *rows]) for columns, rows in tables)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def figures(results: Path) -> dict[str, str]:
    """Read the accuracy at KEEP_TOKENS by method from a result file of `llava quickstart`.

    The unpruned model is there with all its tokens.

    Raises:
        PruningError: it is another file.
    """
    try:
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
        found: dict[str, str] = {}
        for row in rows:
            whole = row["arm"] == "none"
            if row["unavailable"] or not (whole or row["budget"] == KEEP_TOKENS):
                continue
            found.setdefault(row["method"], _figure(row, whole))
    except OSError as error:
        raise PruningError(f"cannot read {results}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PruningError(
            f"{results} is not a result file; make one with python -m llava.eval quickstart "
            "--save-result FILE"
        ) from error
    return found


def _figure(row: dict[str, Any], whole: bool) -> str:
    error = MISSING if row["accuracy_se"] is None else f"{100 * row['accuracy_se']:.1f}"
    setting = row["label"].partition("(")[2].removesuffix(")")
    note = f"all {row['budget']} tokens" if whole else setting
    return f"{100 * row['accuracy']:.1f} ± {error}" + (f" ({note})" if note else "")


def tracked_results(file: Path | None = None) -> Path | None:
    """Find the result file whose figures the catalogue shows; None if there is none.

    Args:
        file: Markdown file that is checked or updated: the results of its own checkout count.
            None: those that come with the package.
    """
    if file is None:
        places = [shipped_path(RESULTS)]
    else:
        places = [folder / "playground" / RESULTS for folder in file.absolute().parents]
    return next((place for place in places if place.is_file()), None)


def update(file: Path, results: Path | None) -> None:
    """Write the catalogue between the markers of `file`.

    Raises:
        UserInputError: the file cannot be read or has no markers.
    """
    sections = {SECTION: render(markdown=True, results=results)}
    file.write_text(fill_sections(file, sections), encoding="utf-8")
