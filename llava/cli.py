"""The console script `llava`: every command of the package under one name.

Only the module of the command that runs is imported: `llava --help` does not wait for torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from llava import __version__
from llava.registry import unknown


class Command(NamedTuple):
    """One line of help, and the module whose `main(argv, prog=...)` runs it.

    `within`: the module has several commands and takes the command's name as its first word.
    """

    summary: str
    module: str
    within: bool = True


_EVAL = "llava.eval.__main__"
COMMANDS = {
    "chat": Command("chat about an image in the terminal", "llava.serve.cli", within=False),
    "quickstart": Command("compare pruning methods on llava-tiny, about five minutes", _EVAL),
    "run": Command("run a benchmark under one or more pruning settings", _EVAL),
    "compare": Command("compare two settings question by question", _EVAL),
    "table": Command("print the tables of a quickstart's result file", _EVAL),
    "paper-table": Command("run every cell of a paper's table, next to what was published", _EVAL),
    "prepare": Command("get the data of a benchmark, or check them", _EVAL),
    "calibrate": Command("measure what pore or btp needs to know of a model", _EVAL),
    "bench": Command(
        "time every stage of pruning, against a pruner that is free",
        "llava.bench.command",
        within=False,
    ),
    "convert": Command(
        "turn a LLaVA checkpoint into Hugging Face's format, or back",
        "llava.model.convert.command",
        within=False,
    ),
    "merge-lora": Command(
        "merge a LoRA into the model it was trained on",
        "llava.train.merge_lora",
        within=False,
    ),
    "extract-projector": Command(
        "write the projector of a LLaVA to a file of its own",
        "llava.train.extract_projector",
        within=False,
    ),
    "methods": Command("list the pruning methods", "llava.pruning.__main__"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 with one line on stderr for an unknown one."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"llava {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"llava: error: {refusal(name)}", file=sys.stderr)
        return 2
    run = import_module(command.module).main
    return run([name, *rest], prog="llava") if command.within else run(rest, prog=f"llava {name}")


def usage() -> str:
    """Return what `llava --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: llava COMMAND ...",
            "",
            "LLaVA with visual token pruning.",
            "",
            *lines,
            "",
            "llava COMMAND --help explains one; llava --version prints the version.",
        ]
    )


def refusal(name: str) -> str:
    """Say why `name` is not run: no command was given, or an unknown one; name the nearest."""
    if not name:
        return f"give a command: {', '.join(COMMANDS)}; llava --help explains them"
    return unknown("command", name, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
