"""The catalogue of methods: what the classes say of themselves, what papers and we measured."""

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from llava.markdown import fill_sections, table
from llava.pruning.decoder.method import DecoderMethod
from llava.pruning.decoder.registry import get_decoder_method, list_decoder_methods
from llava.pruning.errors import PruningError
from llava.pruning.method import PruningMethod
from llava.pruning.registry import get_method, list_methods
from llava.shipped import shipped_path

SECTION = "methods"  # between the markers of docs/methods.md
RESULTS = "results/llava-tiny.json"  # below playground
COLUMNS = (
    *("method", "stage", "signal", "needs", "query-aware", "merges", "fidelity"),
    *("published %", "llava-tiny %", "paper"),
)
MISSING = "n/a"
BEFORE = "tokens"  # the stage of methods that prune before the language model


class Source(NamedTuple):
    """A table of a paper: `where` it is, who ran it (`kind`), and what it `averages`."""

    where: str
    kind: str
    averages: str


class Retention(NamedTuple):
    """`percent` of the unpruned score in `source`, a key of SOURCES; `setting`: which options."""

    percent: float
    source: str
    setting: str = ""


_published = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
KEEP_TOKENS: int = _published["keep_tokens"]
SOURCES = {name: Source(**about) for name, about in _published["sources"].items()}
RETENTION = {
    name: tuple(Retention(**figure) for figure in figures)
    for name, figures in _published["retention"].items()
}


def method_table(measured: dict[str, str] | None = None) -> list[tuple[str, ...]]:
    """Return one row per registered method, in the order of COLUMNS; `measured` as of `figures`.

    Those that prune between layers of the language model come last.
    """
    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        cls = get_method(name)
        wants = (f"({name})" for name in cls.wants)
        needs = ", ".join([*cls.needs, *wants]) or "-"
        rows.append(_row(name, cls, needs, cls.merges, measured))
    for name in list_decoder_methods():
        decoder = get_decoder_method(name)
        merges = decoder.make is not DecoderMethod.make
        rows.append(_row(name, decoder, "-", merges, measured))
    return rows


def _row(
    name: str,
    cls: type[PruningMethod] | type[DecoderMethod],
    needs: str,
    merges: bool,
    measured: dict[str, str] | None,
) -> tuple[str, ...]:
    stage = DecoderMethod.stage if issubclass(cls, DecoderMethod) else BEFORE
    aware, new = ("yes" if flag else "no" for flag in (cls.query_aware, merges))
    facts = (stage, cls.signal or "-", needs, aware, new, cls.fidelity)
    ours = (measured or {}).get(name, MISSING)
    return name, *facts, published(name), ours, cls.paper or "-"


def published(name: str) -> str:
    """Return what papers report of a method, each figure with its source's number; or n/a."""
    numbers = {source: number for number, source in enumerate(SOURCES, start=1)}
    cells = [
        f"{figure.percent:.1f} [{numbers[figure.source]}]"
        + (f" ({figure.setting})" if figure.setting else "")
        for figure in RETENTION.get(name, ())
    ]
    return ", ".join(cells) or MISSING


def legend(results: Path | None) -> str:
    """Explain the two columns of figures, and list the sources by number."""
    if results is None:
        ours = f"no result file was read, so it is {MISSING} everywhere"
    else:
        ours = f"from `{results.name}`; {MISSING} where that run did not have the method"
    lines = [
        f"*published %*: mean over benchmarks of pruned score / unpruned score on LLaVA-1.5-7B at "
        f"{KEEP_TOKENS} of 576 tokens, as reported; {MISSING} where we know of no report. Figures "
        "compare only inside one source, because each averages other benchmarks:",
        "",
        *(
            f"{number}. {source.where}: {source.kind}; mean of {source.averages}."
            for number, source in enumerate(SOURCES.values(), start=1)
        ),
        "",
        f"*llava-tiny %*: accuracy on the model in this repository at {KEEP_TOKENS} of 576 tokens "
        f"± standard error, {ours}. Parentheses: the setting, where it is not the plain method.",
    ]
    return "\n".join(lines)


def render(markdown: bool, results: Path | None = None) -> str:
    """Return the table as aligned text, or as Markdown with its legend.

    Args:
        markdown: which of the two.
        results: result file with our figures, None for none.

    Raises:
        PruningError: the file has no figures.
    """
    lines = method_table(None if results is None else figures(results))
    if markdown:
        return f"{table(COLUMNS, lines, aligned=False)}\n\n{legend(results)}"
    rows = [COLUMNS, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
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
