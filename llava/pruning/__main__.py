"""`python -m llava.pruning list`: the method table, generated from the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.pruning.errors import PruningError
from llava.pruning.registry import get_method, list_methods

BEGIN = "<!-- methods:begin -->"
END = "<!-- methods:end -->"
COLUMNS = ("method", "needs", "query-aware", "merges", "fidelity", "paper")


def method_table() -> list[tuple[str, ...]]:
    """One row per registered method, in the order of COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        cls = get_method(name)
        wants = (f"({name})" for name in cls.wants)
        needs = ", ".join([*cls.needs, *wants]) or "-"
        aware, merges = ("yes" if flag else "no" for flag in (cls.query_aware, cls.merges))
        rows.append((name, needs, aware, merges, cls.fidelity, cls.paper or "-"))
    return rows


def render(markdown: bool) -> str:
    """The table as aligned text, or as Markdown."""
    rows = [COLUMNS, *method_table()]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "| " + " | ".join("---" for _ in COLUMNS) + " |")
        return "\n".join(lines)
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def readme_drift(readme: Path) -> str | None:
    """Why the table of `readme` between the markers is not the generated one, or None."""
    _, section, _ = _split(readme)
    if section == f"\n{render(markdown=True)}\n":
        return None
    fix = f"python -m llava.pruning list --update-readme {readme}"
    return f"the methods table in {readme} is not that of the registered methods; run {fix}"


def update_readme(readme: Path) -> None:
    """Write the table between the markers of `readme`. Raises PruningError if it has none."""
    before, _, after = _split(readme)
    readme.write_text(f"{before}{BEGIN}\n{render(markdown=True)}\n{END}{after}", encoding="utf-8")


def _split(readme: Path) -> tuple[str, str, str]:
    try:
        text = readme.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PruningError(f"{readme} is not UTF-8 text: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    section, end, after = rest.partition(END)
    if not begin or not end:
        raise PruningError(f"{readme} has no section between {BEGIN} and {END}")
    return before, section, after


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; argparse leaves with exit code 2 on wrong usage."""
    parser = OneLineParser(prog="python -m llava.pruning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("list", help="list the pruning methods")
    table.add_argument("--markdown", action="store_true", help="print a Markdown table")
    table.add_argument(
        "--update-readme",
        type=Path,
        metavar="README",
        help="write the Markdown table between the methods markers of this file instead",
    )
    arguments = parser.parse_args(argv)
    with one_line_errors(parser):
        if arguments.update_readme:
            update_readme(arguments.update_readme)
            print(f"updated {arguments.update_readme}")
        else:
            print(render(arguments.markdown))


if __name__ == "__main__":
    main()
