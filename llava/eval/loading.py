"""A model from flags: what the chat and `run_llava` have in common."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from llava.command_line import check_complete, check_conv_mode, choose_conv_mode, device_name
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pixels import PIXELS, PIXELS_HELP, VIEWER
from llava.pruning.flags import add_pruning_flags, pruning_from


@dataclass
class Loaded:
    """What `load_pretrained_model` returns, without the context length."""

    tokenizer: Any
    model: Any
    processor: Any


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add LLaVA's flags that choose how a model is loaded, `--pixels` and the pruning flags."""
    add = parser.add_argument
    add("--model-base", help="base model of a LoRA or projector-only checkpoint")
    add("--conv-mode", help="conversation template, instead of the model's own")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--load-8bit", action="store_true")
    add("--load-4bit", action="store_true")
    add("--pixels", choices=PIXELS, default=VIEWER, help=f"{PIXELS_HELP}; default: {VIEWER}")
    add_pruning_flags(parser)


def load_from_flags(args: argparse.Namespace, name: str | None = None) -> tuple[Loaded, str]:
    """The model of the flags, set to prune as they say, and the key of its chat template.

    Args:
        args: with `model_path` and the flags of `add_model_flags`.
        name: the model's name, where its path does not end in it.

    Raises:
        UserInputError: flags that cannot be used, before anything is loaded; a model that cannot be
            loaded or asked.
    """
    check_conv_mode(args.conv_mode)
    pruning = pruning_from(args)
    name = name or get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        args.load_8bit,
        args.load_4bit,
        device=args.device,
    )
    check_complete(args.model_path, tokenizer, processor)
    if pruning is not None:
        model.pruning = pruning
    template = choose_conv_mode(args.conv_mode, name, model.config)
    return Loaded(tokenizer, model, processor), template
