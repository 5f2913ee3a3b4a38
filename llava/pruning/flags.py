"""The pruning flags of all commands: `--pruner --keep-tokens | --keep-ratio --pruner-option`."""

from __future__ import annotations

import argparse

from llava.pruning.config import PruningConfig, parse_options
from llava.pruning.errors import PruningError


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `pruning_from` reads."""
    add = parser.add_argument
    add("--pruner", metavar="METHOD", help="pruning method, such as zoo")
    add("--keep-tokens", type=int, metavar="N", help="visual tokens kept per image")
    add("--keep-ratio", type=float, metavar="R", help="or the share of them kept, in (0, 1]")
    add("--pruner-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")


def pruning_from(args: argparse.Namespace) -> PruningConfig | None:
    """The setting of the flags; None leaves the model's own in place. Raises PruningError."""
    extra = args.keep_tokens is not None or args.keep_ratio is not None or args.pruner_option
    if args.pruner is None:
        if extra:
            raise PruningError(
                "--keep-tokens, --keep-ratio and --pruner-option need --pruner METHOD"
            )
        return None
    options = parse_options(args.pruner_option)
    return PruningConfig(args.pruner, args.keep_tokens, args.keep_ratio, options)
