"""What the commands of this package share: one-line errors, and what flags of one name mean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from llava.conversation import SeparatorStyle, conv_mode_for, conv_templates
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

# What the user can correct; anything else that is raised is a bug of ours and keeps its traceback.
CORRECTABLE = (UserInputError, OSError, torch.OutOfMemoryError)


def explain(error: Exception) -> str:
    """One line for an error of `CORRECTABLE`: what is wrong and what to do."""
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


def device_name(name: str) -> str:
    """`name` if it is `auto`, or a device that torch can use here."""
    try:
        # Read back, because a tensor on `meta` holds no numbers.
        torch.zeros(1, device="cpu" if name in ("auto", "cuda") else name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(
            f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    return name


def check_complete(path: str | Path, tokenizer: Any, processor: Any) -> None:
    """Refuse a model that nobody can ask about an image. Raises UserInputError.

    Args:
        path: where it was loaded from.
        tokenizer, processor: what `load_pretrained_model` returned; None for what is missing.
    """
    if processor is None:
        raise UserInputError(f"{path} is not a LLaVA model: it has no vision tower; give a LLaVA")
    if tokenizer is None:
        raise UserInputError(
            f"{path} holds no tokenizer, so it cannot read a question; put the tokenizer.model or "
            "tokenizer.json of its language model into the folder"
        )


def check_conv_mode(mode: str | None) -> None:
    """Refuse a useless template before a model is loaded for nothing. Raises UserInputError."""
    if mode is None:
        return
    if mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise UserInputError(f"unknown --conv-mode {mode!r}; valid: {known}")
    check_chat_template(mode)


def check_chat_template(template: str) -> None:
    """Raise UserInputError for a template without turns, in which nothing can be asked."""
    if conv_templates[template].sep_style is SeparatorStyle.PLAIN:
        raise UserInputError(
            f"template {template!r} holds captions, no chat; use another --conv-mode"
        )


def choose_conv_mode(mode: str | None, model_name: str, config: Any) -> str:
    """The template asked for, else the model's; says on stderr when both exist and differ.

    Raises UserInputError for one that does not exist or holds no chat.
    """
    check_conv_mode(mode)
    own = conv_mode_for(model_name, config)
    if mode is not None and mode != own:
        print(f"note: --conv-mode {mode} replaces {own}, this model's own", file=sys.stderr)
    chosen = mode or own
    check_chat_template(chosen)
    return chosen
