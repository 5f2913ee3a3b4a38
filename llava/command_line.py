"""What the commands of this package share: one-line errors, and the flags that choose a model."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from llava.anyres import NEXT_PROTOCOLS
from llava.conversation import SeparatorStyle, conv_templates
from llava.pixels import PIXELS, PIXELS_HELP
from llava.pruning.flags import add_pruning_flags
from llava.registry import unknown
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

DTYPES = ("float16", "bfloat16", "float32")

# What the user can correct; anything else that is raised is a bug of ours and keeps its traceback.
CORRECTABLE = (UserInputError, OSError, torch.OutOfMemoryError)


def explain(error: Exception) -> str:
    """Say in one line what is wrong and what to do about an error of `CORRECTABLE`."""
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device has too little memory; use a smaller batch, --load-8bit or --load-4bit, "
            f"fewer visual tokens, or another --device ({text.split('. ')[0]})"
        )
    return text


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2, without the usage text.

    Flags of `type=Path` understand `~`, see `user_path`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, user_path)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser, debug: bool = False) -> Iterator[None]:
    """Turn what the user can correct into one line on stderr, exit code 2; `debug` lets it rise."""
    try:
        yield
    except CORRECTABLE as error:
        if debug:
            raise
        parser.error(explain(error))


def add_model_flags(
    parser: argparse.ArgumentParser,
    *,
    model: str | None = None,
    template: str = "the model's own",
    pixels: str | None = None,
) -> None:
    """Add the flags of every command that asks a model: which, how it is loaded, prompted, pruned.

    Args:
        parser: of the command.
        model: default of `--model-path`; without one the flag is required.
        template: what `--conv-mode` is by default, in words.
        pixels: default of `--pixels`; without one the benchmark's reading counts.
    """
    add = parser.add_argument
    kinds = "checkpoint folder or hub name" if model is None else f"checkpoint, hub name or {model}"
    add("--model-path", required=model is None, default=model, help=kinds)
    add("--model-base", help="base model of a LoRA or projector-only checkpoint")
    add("--conv-mode", help=f"conversation template; by default {template}")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 on the CPU, else 16 bits"
    )
    precision.add_argument("--load-8bit", action="store_true")
    precision.add_argument("--load-4bit", action="store_true")
    add("--mm-next-protocol", choices=NEXT_PROTOCOLS, help="how LLaVA-1.6 counts tokens")
    reading = "by default what the benchmark's are" if pixels is None else f"default: {pixels}"
    add("--pixels", choices=PIXELS, default=pixels, help=f"{PIXELS_HELP}; {reading}")
    add_pruning_flags(parser)


def natural(text: str, low: int = 0) -> int:
    """Read the value of a flag that takes whole numbers from 0 on."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from error
    if number < low:
        raise argparse.ArgumentTypeError(f"must be at least {low}, got {number}")
    return number


def positive(text: str) -> int:
    """Read the value of a flag that takes whole numbers from 1 on."""
    return natural(text, low=1)


def device_name(name: str) -> str:
    """Return `name` if it is `auto`, or a device that torch can use here."""
    try:
        # Read back, because a tensor on `meta` has no numbers.
        torch.zeros(1, device="cpu" if name in ("auto", "cuda") else name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(
            f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    return name


def check_conv_mode(mode: str | None) -> None:
    """Refuse a template that cannot be used before a model is loaded for nothing.

    Raises:
        UserInputError: it does not exist, or has no turns.
    """
    if mode is None:
        return
    if mode not in conv_templates:
        raise UserInputError(unknown("--conv-mode", mode, conv_templates))
    check_chat_template(mode)


def check_chat_template(template: str) -> None:
    """Refuse a template without turns, in which nothing can be asked.

    Raises:
        UserInputError: names the template.
    """
    if conv_templates[template].sep_style is SeparatorStyle.PLAIN:
        raise UserInputError(
            f"template {template!r} is for captions, not for a chat; use another --conv-mode"
        )
