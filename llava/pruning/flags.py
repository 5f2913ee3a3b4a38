"""The pruning flags of all commands: `--pruner`, its budget, its options, and CHOICES."""

import argparse

from llava.pruning.config import CHOICES, PruningConfig, parse_options
from llava.pruning.errors import PruningError


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `pruning_from` reads."""
    add = parser.add_argument
    add("--pruner", metavar="METHOD", help="pruning method, such as zoo")
    add("--keep-tokens", type=int, metavar="N", help="visual tokens kept per image")
    add("--keep-ratio", type=float, metavar="R", help="or the share of them kept, in (0, 1]")
    add("--pruner-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    for name, (values, summary) in CHOICES.items():
        add(f"--{name}", choices=values, help=f"{summary}; default {values[0]}")


def pruning_from(args: argparse.Namespace) -> PruningConfig | None:
    """Return the setting of the flags; None leaves the model's own in place.

    Raises:
        PruningError: the flags are not a valid setting.
    """
    names = ("keep_tokens", "keep_ratio", "pruner_option", *CHOICES)
    given = [name for name in names if getattr(args, name) not in (None, [])]
    if args.pruner is None:
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise PruningError(
                f"{flags}: give a method too, such as --pruner zoo; "
                "python -m llava.pruning list names all"
            )
        return None
    choices = {name: getattr(args, name) for name in CHOICES if name in given}
    options = parse_options(args.pruner_option)
    return PruningConfig(args.pruner, args.keep_tokens, args.keep_ratio, options, **choices)
