"""The pruning flags of all commands: `--pruner`, its budget, its options, and CHOICES.

`--decoder-pruner` and what belongs to it say what is dropped between layers of the language model,
alone or behind `--pruner`.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from llava.pruning.budgets import check_count, check_share
from llava.pruning.config import CHOICES, PruningConfig, parse_options
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import DECODER_METHODS
from llava.pruning.errors import PruningError

_OF_PRUNER = ("keep_tokens", "keep_ratio", "pruner_option")
_OF_DECODER = ("decoder_keep_tokens", "decoder_keep_ratio", "decoder_option")


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `pruning_from` reads."""
    add = parser.add_argument
    add("--pruner", metavar="METHOD", help="pruning method, such as zoo")
    add("--keep-tokens", type=int, metavar="N", help="visual tokens kept per image")
    add("--keep-ratio", type=float, metavar="R", help="or the share of them kept, in (0, 1]")
    add("--pruner-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add(
        "--decoder-pruner",
        metavar="METHOD",
        help="method that drops tokens between layers of the language model, such as fastv; alone "
        "or behind --pruner",
    )
    add(
        "--decoder-keep-tokens",
        type=int,
        metavar="N",
        help="its budget: visual tokens of an image that a layer reads, the mean over layers; "
        "default: the method's published schedule",
    )
    add(
        "--decoder-keep-ratio",
        type=float,
        metavar="R",
        help="or the share of all tokens of the image, in (0, 1]",
    )
    add("--decoder-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    for name, (values, summary) in CHOICES.items():
        add(f"--{name}", choices=values, help=f"{summary}; default {values[0]}")


def given_flags(args: argparse.Namespace) -> list[str]:
    """Return those of the flags of `add_pruning_flags` that were given, as users write them."""
    names = ("pruner", *_OF_PRUNER, "decoder_pruner", *_OF_DECODER, *CHOICES)
    return [
        f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, [])
    ]


def pruning_from(args: argparse.Namespace) -> PruningConfig | None:
    """Return the setting of the flags; None leaves the model's own in place.

    Raises:
        PruningError: the flags are not a valid setting.
    """
    decoder = decoder_from(args)
    names = (*_OF_PRUNER, *(CHOICES if decoder is None else ()))
    given = [name for name in names if getattr(args, name) not in (None, [])]
    if args.pruner is None and given:
        raise PruningError(
            f"{_flags(given)}: give a method too, such as --pruner zoo; "
            "python -m llava.pruning list names all"
        )
    if args.pruner is None and decoder is None:
        return None
    choices = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    budget, options = (args.keep_tokens, args.keep_ratio), parse_options(args.pruner_option)
    return make_pruning(args.pruner, budget, options, decoder, choices)


def make_pruning(
    method: str | None,
    budget: tuple[int | None, float | None],
    options: Mapping[str, Any],
    decoder: DecoderConfig | None = None,
    choices: Mapping[str, Any] | None = None,
) -> PruningConfig:
    """Make the setting of what a user names apart.

    Args:
        method: what prunes; it may also be a method that prunes between layers. None for nothing
            before the language model.
        budget: its tokens, or their share.
        options: of the method.
        decoder: what is dropped between layers besides.
        choices: settings of CHOICES.

    Raises:
        PruningError: they are not a valid setting.
    """
    method, others = method or "none", dict(choices or {})
    if method not in DECODER_METHODS.entries():
        return PruningConfig(method, *budget, options=options, decoder=decoder, **others)
    if decoder is not None:
        raise PruningError(
            f"{method!r} and {decoder.method!r} both prune inside the language model; give one "
            "of them"
        )
    return PruningConfig(decoder=DecoderConfig(method, *budget, options=options), **others)


def decoder_from(args: argparse.Namespace) -> DecoderConfig | None:
    """Return what the flags drop between layers.

    Raises:
        PruningError: the flags are not a valid setting.
    """
    if args.decoder_pruner is None:
        given = [name for name in _OF_DECODER if getattr(args, name) not in (None, [])]
        if given:
            raise PruningError(
                f"{_flags(given)}: give a method too, such as --decoder-pruner fastv"
            )
        return None
    options = parse_options(args.decoder_option)
    tokens, ratio = args.decoder_keep_tokens, args.decoder_keep_ratio
    if tokens is not None and ratio is not None:
        raise PruningError("give --decoder-keep-tokens or --decoder-keep-ratio, not both")
    if tokens is not None:
        check_count(tokens, "--decoder-keep-tokens")
    if ratio is not None:
        check_share("--decoder-keep-ratio", ratio)
    return DecoderConfig(args.decoder_pruner, tokens, ratio, options)


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
