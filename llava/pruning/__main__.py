"""`llava methods`, or `python -m llava.pruning list`: the catalogue of methods."""

from collections.abc import Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.markdown import add_update_flag
from llava.pruning.catalogue import render, tracked_results, update


def main(argv: Sequence[str] | None = None, prog: str = "python -m llava.pruning") -> int:
    """Run the command and return 0; argparse leaves with exit code 2 on wrong usage.

    `prog`: how the user called this program; help and errors repeat it.
    """
    parser = build_parser(prog)
    arguments = parser.parse_args(argv)
    with one_line_errors(parser):
        for file in arguments.update:
            update(file, arguments.results or tracked_results(file))
            print(f"updated {file}")
        if not arguments.update:
            print(render(arguments.markdown, arguments.results or tracked_results()))
    return 0


def build_parser(prog: str = "python -m llava.pruning") -> OneLineParser:
    """Make the parser: `list` here is `methods` of the console script."""
    parser = OneLineParser(prog=prog, description="The pruning methods, from their classes.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "methods"):
        command = commands.add_parser(name, help="list the pruning methods")
        command.add_argument("--markdown", action="store_true", help="print a Markdown table")
        command.add_argument(
            "--results",
            type=Path,
            metavar="FILE",
            help="result file with our figures; default: playground/results/llava-tiny.json of the "
            "checkout that an updated file lies in, else the one that comes with the package",
        )
        add_update_flag(command, "write the table between the methods markers of this file")
    return parser


if __name__ == "__main__":
    main()
