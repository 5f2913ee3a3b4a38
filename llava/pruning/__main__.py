"""`python -m llava.pruning list [--markdown]`: the method table, generated from the classes."""

from __future__ import annotations

from collections.abc import Sequence

from llava.command_line import OneLineParser
from llava.pruning.registry import get_method, list_methods

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


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; argparse leaves with exit code 2 on wrong usage."""
    parser = OneLineParser(prog="python -m llava.pruning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("list", help="list the pruning methods")
    table.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args(argv)
    print(render(arguments.markdown))


if __name__ == "__main__":
    main()
