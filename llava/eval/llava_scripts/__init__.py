"""LLaVA's own command lines: the same names, flags, output files and printed text.

`vqa` answers question files (`model_vqa*`), `score` prints figures of answer files (`eval_*`), and
`convert` makes the files that servers and graders take (`convert_*`). Each command is one `Program`
there; the modules and scripts that LLaVA's users call by name run it.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, one_line_errors

AddFlags = Callable[[argparse.ArgumentParser], Any]


def flag(name: str, **settings: Any) -> AddFlags:
    """Declare a flag, with the settings of `argparse`."""
    return lambda parser: parser.add_argument(name, **settings)


def path_flag(
    name: str, help: str | None = None, *, required: bool = True, default: Path | None = None
) -> AddFlags:
    """Declare a flag that names a file or folder."""
    return flag(name, type=Path, help=help, required=required, default=default)


@dataclass(frozen=True)
class Program:
    """One command line. Calling it parses `argv` and runs it.

    Attributes:
        name: its name in usage and errors: a module, or a file in `scripts`.
        description: what `--help` says.
        flags: what adds its flags to a parser, in the order of `--help`.
        run: does the work with the parsed flags; returns an exit code, None for 0.
    """

    name: str
    description: str
    flags: Sequence[AddFlags]
    run: Callable[[argparse.Namespace], int | None]

    def parser(self) -> argparse.ArgumentParser:
        """Build the parser of its flags."""
        parser = OneLineParser(prog=self.name, description=self.description)
        for add_flags in self.flags:
            add_flags(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run with `argv`, by default the arguments of this process.

        Returns the exit code. Ends the process with 2 and one line on stderr for unusable input.
        """
        parser = self.parser()
        words = sys.argv[1:] if argv is None else list(argv)
        args = parser.parse_args(words)
        args.command_line = shlex.join(["python", "-m", self.name, *words])
        with one_line_errors(parser):
            code = self.run(args)
        return code or 0


def program(name: str, *flags: AddFlags) -> Callable[[Callable[..., int | None]], Program]:
    """Make a function of parsed flags a `Program`, which its docstring describes."""
    return lambda run: Program(name, run.__doc__ or "", flags, run)
