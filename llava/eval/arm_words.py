"""Arms as flags spell them: `--arm zoo:directions=32@64`, or `--pruner zoo --keep-tokens 64`.

A whole number is a budget of tokens, a number with a point a share of them: `zoo@1` keeps one
token, `zoo@1.0` all. `arm_word` and `parse_arm` are each other's inverse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.eval.engine.request import UNPRUNED, Arm
from llava.model.checkpoint import local_checkpoint, read_config
from llava.pruning import PruningConfig, PruningError, parse_options
from llava.pruning.config import CHOICES
from llava.pruning.flags import pruning_from
from llava.utils import UserInputError


def arms_from(args: argparse.Namespace) -> tuple[Arm, ...]:
    """The settings of `--arm`, `--preset` and `--pruner`; empty if there are none.

    Raises UserInputError (PruningError among them) for one that does not exist or stands twice.
    """
    arms = [parse_arm(word) for word in args.arm]
    preset = preset_of(args)
    own = parse_options(args.pruner_option)
    own |= {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    words = spell_options(own)
    if preset is not None:
        if args.pruner is not None or args.pruner_option:
            raise UserInputError("--preset names method and options; leave --pruner out")
        name = f"{preset.name}:{words}" if words else preset.name
        arms.append(_flag_arm(args, preset.method, {**preset.options, **own}, name))
    elif args.pruner is not None:
        name = f"{args.pruner}:{words}" if words else args.pruner
        arms.append(_flag_arm(args, args.pruner, own, name))
    else:
        pruning_from(args)  # refuses a budget or options without a method
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserInputError(f"the arm {name} is given twice")
    for arm in arms:
        arm.pruning(args.seed)  # refuses what does not exist
    return tuple(arms)


def arm_of(setting: PruningConfig | None) -> Arm:
    """A setting, such as the one a checkpoint was saved with, as `--arm` would spell it."""
    if setting is None or setting.method == UNPRUNED:
        return parse_arm(UNPRUNED)
    settings = setting.to_dict()
    options = settings.pop("options", {})
    method, tokens = settings.pop("method"), settings.pop("keep_tokens", None)
    ratio = settings.pop("keep_ratio", None)
    return parse_arm(arm_word(method, tokens if ratio is None else ratio, {**options, **settings}))


def saved_pruning(path: str | Path) -> PruningConfig | None:
    """The setting that a checkpoint, in a folder or on the hub, was saved with."""
    saved = read_config(local_checkpoint(path)).get("mm_token_pruning")
    return None if saved is None else PruningConfig.from_dict(saved)


def parse_arm(word: str) -> Arm:
    """`none`, `zoo@64`, `zoo@0.1` or `zoo:directions=32,fusion=sum@64`.

    Values of options may be JSON, with commas and `@` in quotes or brackets:
    `cen-prune:host=zoo,host_options={"directions": 32, "step": 0.1}@64`. Raises PruningError.
    """
    *head, budget = _split(word, "@")
    if not head:
        head, budget = [word], ""
    method, _, options = "@".join(head).partition(":")
    tokens, ratio = _budget(budget, word)
    pairs = _split(options, ",") if options else []
    return _arm(word, method, parse_options(pairs), tokens, ratio)


def arm_word(method: str, budget: int | float | None, options: Mapping[str, Any]) -> str:
    """The word that `parse_arm` reads as just this setting: `zoo:fusion=sum@64`.

    Args:
        method: registered name, or `none`.
        budget: an integer is a number of tokens, a float a share of them; None without a budget.
        options: of the method, any JSON values.
    """
    words = spell_options(options)
    word = f"{method}:{words}" if words else method
    return word if budget is None else f"{word}@{budget}"


def spell_options(options: Mapping[str, Any]) -> str:
    """`directions=32,fusion=sum`: values as they are where they are read back so, else as JSON."""
    return ",".join(f"{key}={_spell(value)}" for key, value in options.items())


def _spell(value: Any) -> str:
    text, as_json = str(value), json.dumps(value)
    if not set(text) & set('"[]{},@'):
        (read,) = parse_options([f"value={text}"]).values()
        if json.dumps(read) == as_json:
            return text
    return as_json


def _split(text: str, separator: str) -> list[str]:
    """`text` at every separator outside quotes and brackets, as JSON has them.

    Text that leaves one open is split at every separator.
    """
    parts, depth, quoted, escaped = [""], 0, False, False
    for letter in text:
        if letter == separator and not depth and not quoted:
            parts.append("")
            continue
        parts[-1] += letter
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "[{") - (letter in "]}")
    return text.split(separator) if quoted or depth else parts


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
    parts = [method, *(f"{key}={_spell(value)}" for key, value in options.items())]
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
