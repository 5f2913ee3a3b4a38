"""`llava table RESULT.json`: tables from a result file, into Markdown files too."""

import argparse
from pathlib import Path

from llava.eval.engine.schema import read_result
from llava.eval.report.result import full_section, update
from llava.markdown import add_update_flag


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `table` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("table", help="print the tables of a result file as Markdown")
    parser.add_argument("result", type=Path, help="file written by quickstart --save-result")
    add_update_flag(parser, "write them between the llava-tiny markers of this Markdown file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables, or put them into Markdown files."""
    for file in args.update:
        update(file, args.result)
        print(f"updated {file}")
    if not args.update:
        print(full_section(read_result(args.result)), end="")
    return 0
