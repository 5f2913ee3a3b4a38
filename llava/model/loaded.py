"""A LLaVA ready to be asked: the model with what prompts and pictures need."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from llava.command_line import check_chat_template, check_conv_mode
from llava.conversation import conv_mode_for
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.pruning.config import PruningConfig
from llava.pruning.flags import pruning_from
from llava.utils import UserInputError


@dataclass(frozen=True)
class LoadedModel:
    """A model and what it takes to ask it about pictures.

    Attributes:
        model, tokenizer, image_processor: as from `load_pretrained_model`.
        template: key of `conv_templates`.
        own_pruning: the setting that the checkpoint was saved with.
        name: what the model is called.
    """

    model: LlavaCausalLM
    tokenizer: Any
    image_processor: Any
    template: str
    own_pruning: PruningConfig | None = None
    name: str = ""


def load_model(
    path: str,
    device: str = "auto",
    *,
    base: str | None = None,
    conv_mode: str | None = None,
    name: str | None = None,
    **loading: Any,
) -> LoadedModel:
    """Load a checkpoint, with pruning switched off: whoever asks brings a setting.

    Args:
        path, base, device: as in `load_pretrained_model`.
        conv_mode: conversation template; by default the model's own.
        name: the model's name, where its path does not end in it.
        **loading: more arguments of `load_pretrained_model`, such as `load_4bit` or `dtype`.

    Raises:
        UserInputError: what cannot be loaded, or asked about a picture.
    """
    check_conv_mode(conv_mode)
    name = name or get_model_name_from_path(path)
    tokenizer, model, processor, _ = load_pretrained_model(
        path, base, name, device=device, **loading
    )
    _check_complete(path, tokenizer, processor)
    own, model.pruning = model.pruning, None
    template = conv_mode or conv_mode_for(name, model.config)
    check_chat_template(template)
    return LoadedModel(model.eval(), tokenizer, processor, template, own, name)


def load_from_flags(args: argparse.Namespace, name: str | None = None) -> LoadedModel:
    """Load the model of the flags, set to prune as they say, else as it was saved.

    Says on stderr where `--conv-mode` replaces the model's own template.

    Args:
        args: with the flags of `llava.command_line.add_model_flags`.
        name: the model's name, where its path does not end in it.

    Raises:
        UserInputError: flags that cannot be used, before anything is loaded; a model that cannot be
            loaded or asked.
    """
    pruning = pruning_from(args)
    loading = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit}
    for key in ("dtype", "mm_next_protocol"):
        if getattr(args, key) not in (None, "native"):
            loading[key] = getattr(args, key)
    loaded = load_model(
        args.model_path,
        args.device,
        base=args.model_base,
        conv_mode=args.conv_mode,
        name=name,
        **loading,
    )
    loaded.model.pruning = loaded.own_pruning if pruning is None else pruning
    own = conv_mode_for(loaded.name, loaded.model.config)
    if loaded.template != own:
        print(
            f"note: --conv-mode {loaded.template} replaces {own}, this model's own", file=sys.stderr
        )
    return loaded


def _check_complete(path: str, tokenizer: Any, processor: Any) -> None:
    """Refuse a model that nobody can ask about a picture.

    Args:
        path: where it was loaded from.
        tokenizer, processor: what `load_pretrained_model` returned; None for what is missing.

    Raises:
        UserInputError: names what is missing.
    """
    if processor is None:
        raise UserInputError(f"{path} is not a LLaVA model: it has no vision tower; give a LLaVA")
    if tokenizer is None:
        raise UserInputError(
            f"{path} has no tokenizer, so it cannot read a question; put the tokenizer.model or "
            "tokenizer.json of its language model into the folder"
        )
