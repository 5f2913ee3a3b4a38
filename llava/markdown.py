"""Sections of Markdown files that are generated: what lies between two marker comments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llava.utils import UserInputError


def markers(name: str) -> tuple[str, str]:
    """The comments before and after the section called `name`."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def fill_sections(file: Path, sections: Mapping[str, Callable[[], str]]) -> str:
    """Return the text of `file` with new content in its generated sections.

    Args:
        file: a Markdown file that has at least one of the sections.
        sections: what makes the content of each, by name; called for those that the file has.

    Raises:
        UserInputError: the file cannot be read or has none of the sections.
    """
    text, found = read_markdown(file), False
    for name, make in sections.items():
        begin, end = markers(name)
        before, start, rest = text.partition(begin)
        _, stop, after = rest.partition(end)
        if start and stop:
            text, found = f"{before}{begin}\n{make().rstrip()}\n{end}{after}", True
    if not found:
        wanted = " or ".join(" and ".join(markers(name)) for name in sections)
        raise UserInputError(f"{file} has no section between {wanted}")
    return text


def read_markdown(file: Path) -> str:
    """Text of a file. Raises UserInputError if it cannot be read or is not text."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserInputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"{file} is not UTF-8 text: {error}") from error
