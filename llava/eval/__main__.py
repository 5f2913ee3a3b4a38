"""`python -m llava.eval COMMAND`: run comparisons and print what they found."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from llava.command_line import CORRECTABLE, OneLineParser, explain
from llava.eval.commands import calibrate, compare, paper_table, prepare, quickstart, run, table


def main(argv: Sequence[str] | None = None, prog: str = "python -m llava.eval") -> int:
    """Run one command; 0 if it did its work, 2 with one line on stderr for unusable input.

    `prog`: how the user called this program; help, errors and run descriptions repeat it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(prog).parse_args(words)
    args.command_line = shlex.join([*prog.split(), *words])
    try:
        return args.run(args)
    except CORRECTABLE as error:
        name = prog.removeprefix("python -m ")
        print(f"{name}: error: {explain(error)}", file=sys.stderr)
        return 2


def build_parser(prog: str = "python -m llava.eval") -> argparse.ArgumentParser:
    """Return the parser of all commands of this package."""
    parser = OneLineParser(prog=prog, description="Run comparisons and print what they found.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (quickstart, run, compare, paper_table, table, prepare, calibrate):
        module.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
