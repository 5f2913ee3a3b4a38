"""Markdown that this package writes: tables, and generated sections of documents."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.utils import UserInputError


def add_update_flag(parser: ArgumentParser, what: str) -> None:
    """Add `--update FILE`, under its older name too; `what` it does is the help."""
    parser.add_argument(
        "--update",
        "--update-readme",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"{what}; repeatable",
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, aligned: bool = True) -> str:
    """Return a table. `aligned` pads its columns, so that it reads as well in a terminal."""
    rows = [list(header), *map(list, lines)]
    widths = [max(3, *map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    if aligned:
        rule[1:] = [f"{dashes[1:]}:" for dashes in rule[1:]]
        rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    else:
        rule = ["---"] * len(widths)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def markers(name: str) -> tuple[str, str]:
    """Return the comments before and after the section called `name`."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def fill_sections(file: Path, sections: Mapping[str, str]) -> str:
    """Return the text of `file` with `sections`, contents by name, in the sections that it has.

    Raises:
        UserInputError: the file cannot be read or has none of the sections.
    """
    text, found = read_markdown(file), False
    for name, content in sections.items():
        begin, end = markers(name)
        before, start, rest = text.partition(begin)
        _, stop, after = rest.partition(end)
        if start and stop:
            text, found = f"{before}{begin}\n{content.rstrip()}\n{end}{after}", True
    if not found:
        wanted = " or ".join(" and ".join(markers(name)) for name in sections)
        raise UserInputError(f"{file} has no section between {wanted}")
    return text


def find_drift(file: Path, sections: Mapping[str, str], fix: str) -> str | None:
    """Return why the generated sections of `file` are out of date, or None.

    Args:
        file, sections: as in `fill_sections`.
        fix: the command that updates them.

    Raises:
        UserInputError: as in `fill_sections`.
    """
    if fill_sections(file, sections) == read_markdown(file):
        return None
    return f"the tables in {file} are out of date; run {fix}"


def read_markdown(file: Path) -> str:
    """Return the text of a file.

    Raises:
        UserInputError: it cannot be read or is not text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserInputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"{file} is not UTF-8 text: {error}") from error
