"""`python -m llava.pruning list`: the catalogue of methods, generated from the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.pruning.catalogue import RESULTS, render, update_readme


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; argparse leaves with exit code 2 on wrong usage."""
    parser = OneLineParser(prog="python -m llava.pruning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("list", help="list the pruning methods")
    table.add_argument("--markdown", action="store_true", help="print a Markdown table")
    table.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help=f"result file with our figures; default: {RESULTS}, where there is one beside the "
        "README that is updated, or else in the working directory",
    )
    table.add_argument(
        "--update-readme",
        type=Path,
        metavar="README",
        help="write the Markdown table between the methods markers of this file instead",
    )
    arguments = parser.parse_args(argv)
    readme, results = arguments.update_readme, arguments.results
    if results is None:
        usual = (readme.parent if readme else Path()) / RESULTS
        results = usual if usual.exists() else None
    with one_line_errors(parser):
        if readme:
            update_readme(readme, results)
            print(f"updated {readme}")
        else:
            print(render(arguments.markdown, results))


if __name__ == "__main__":
    main()
