"""Arms as flags spell them: `--arm zoo:directions=32@64`, or `--pruner zoo --keep-tokens 64`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llava.eval.arms import UNPRUNED, Arm
from llava.pruning import PruningError, parse_options
from llava.utils import UserInputError


def arms_from(args: argparse.Namespace) -> tuple[Arm, ...]:
    """The settings of `--arm`, `--preset` and `--pruner`; the unpruned model if there are none.

    Raises UserInputError (PruningError among them) for one that does not exist or stands twice.
    """
    arms = [parse_arm(word) for word in args.arm]
    budgeted = args.keep_tokens is not None or args.keep_ratio is not None
    preset = preset_of(args)
    if preset is not None:
        if args.pruner is not None or args.pruner_option:
            raise UserInputError("--preset names method and options; leave --pruner out")
        arms.append(_flag_arm(args, preset.method, preset.options, preset.name))
    elif args.pruner is not None:
        options = parse_options(args.pruner_option)
        words = ",".join(f"{key}={value}" for key, value in options.items())
        name = f"{args.pruner}:{words}" if words else args.pruner
        arms.append(_flag_arm(args, args.pruner, options, name))
    elif budgeted or args.pruner_option:
        raise UserInputError("--keep-tokens, --keep-ratio and --pruner-option need --pruner METHOD")
    arms = arms or [parse_arm(UNPRUNED)]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserInputError(f"the arm {name} is given twice")
    for arm in arms:
        arm.pruning(args.seed)  # refuses what does not exist
    return tuple(arms)


def parse_arm(word: str) -> Arm:
    """`none`, `zoo@64`, `zoo@0.1` or `zoo:directions=32,fusion=sum@64`. Raises PruningError."""
    head, at, budget = word.rpartition("@")
    if not at:
        head, budget = word, ""
    method, _, options = head.partition(":")
    tokens, ratio = _budget(budget, word)
    return _arm(word, method, parse_options(options.split(",")) if options else {}, tokens, ratio)


def preset_of(args: argparse.Namespace) -> Any:
    """The preset that the flags name, or None. Raises UserInputError for an unknown one."""
    if args.preset is None:
        return None
    from llava.eval.presets import get_preset

    return get_preset(args.preset)


def _flag_arm(args: argparse.Namespace, method: str, options: Mapping[str, Any], name: str) -> Arm:
    if method == UNPRUNED:
        return _arm(UNPRUNED, method, options, None, None)
    budget = args.keep_tokens if args.keep_ratio is None else args.keep_ratio
    if args.keep_tokens is not None and args.keep_ratio is not None:
        raise PruningError("give --keep-tokens or --keep-ratio, not both")
    word = name if budget is None else f"{name}@{budget}"
    return _arm(word, method, options, args.keep_tokens, args.keep_ratio)


def _arm(
    name: str,
    method: str,
    options: Mapping[str, Any],
    tokens: int | None,
    ratio: float | None,
) -> Arm:
    if method == UNPRUNED:
        if options or tokens is not None or ratio is not None:
            raise PruningError(f"{name}: the unpruned model takes no options and no budget")
        return Arm(UNPRUNED, "the unpruned model")
    budget = f"{tokens} tokens" if ratio is None else f"{100 * ratio:g} % of the tokens"
    parts = [method, *(f"{key}={value}" for key, value in options.items())]
    if tokens is not None or ratio is not None:
        parts.append(budget)
    return Arm(name, ", ".join(parts), method, tokens, ratio=ratio, options=options)


def _budget(text: str, word: str) -> tuple[int | None, float | None]:
    if not text:
        return None, None
    try:
        if text.isdecimal():
            return int(text), None
        return None, float(text)
    except ValueError as error:
        raise PruningError(
            f"arm {word!r}: {text!r} is no budget; give a number of tokens such as 64, or a share "
            "such as 0.1"
        ) from error
