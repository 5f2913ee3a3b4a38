"""`python -m llava.eval COMMAND`: run comparisons and print what they found."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from llava.command_line import OneLineParser
from llava.eval import prepare, quickstart, selection_speed, table_command
from llava.utils import UserInputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did its work, 2 with one line on stderr for unusable input."""
    parser = OneLineParser(prog="python -m llava.eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (quickstart, table_command, selection_speed, prepare):
        module.add_command(commands)
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    args.command_line = shlex.join(["python", "-m", "llava.eval", *words])
    try:
        return args.run(args)
    except (UserInputError, OSError) as error:
        print(f"llava.eval: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
