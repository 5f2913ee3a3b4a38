"""`python -m llava.eval table RESULT.json`: tables from a result file, into a README too."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.eval.results import read_result
from llava.eval.tables import readme_section, update_readme


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `table` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("table", help="print the tables of a result file as Markdown")
    parser.add_argument("result", type=Path, help="file written by quickstart --save-result")
    parser.add_argument(
        "--update-readme",
        type=Path,
        metavar="README",
        help="write them between the llava-tiny markers of this file instead",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables, or put them into a README."""
    if args.update_readme:
        update_readme(args.update_readme, args.result)
        print(f"updated {args.update_readme}")
    else:
        print(readme_section(read_result(args.result)), end="")
    return 0
