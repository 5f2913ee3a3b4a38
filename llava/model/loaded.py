"""A LLaVA ready to be asked: the model with what prompts and pictures need."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import Any

from llava.command_line import check_chat_template, check_conv_mode
from llava.conversation import conv_mode_for
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import checkpoint_here, local_checkpoint
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


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint, not loaded: where it is and how it is loaded and asked.

    Attributes:
        path, base, device, dtype, mm_next_protocol, load_8bit, load_4bit: as in
            `load_pretrained_model`.
        conv_mode: conversation template; by default the model's own.
        name: the model's name, where its path does not end in it.

    Raises:
        UserInputError: an unknown template.
    """

    path: str
    base: str | None = None
    device: str = "auto"
    conv_mode: str | None = None
    dtype: str | None = None
    mm_next_protocol: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        check_conv_mode(self.conv_mode)

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        *,
        dtype: str | None = None,
        mm_next_protocol: str | None = None,
        name: str | None = None,
    ) -> ModelSpec:
        """Read the flags of `llava.command_line.add_model_flags`.

        Args:
            args: the flags.
            dtype, mm_next_protocol: what counts where the flags leave it open.
            name: see the class.
        """
        return cls(
            args.model_path,
            args.model_base,
            args.device,
            args.conv_mode,
            args.dtype or dtype,
            args.mm_next_protocol or mm_next_protocol,
            args.load_8bit,
            args.load_4bit,
            name,
        )

    def located(self, *, download: bool = True) -> ModelSpec:
        """Return the same with folders instead of hub names.

        Args:
            download: get what is not here yet; otherwise its name stays.

        Raises:
            UserInputError: neither a folder nor a hub name, or a download that fails.
        """
        find = local_checkpoint if download else checkpoint_here
        base = None if self.base is None else str(find(self.base) or self.base)
        return replace(self, path=str(find(self.path) or self.path), base=base)

    @property
    def loading(self) -> dict[str, Any]:
        """More arguments of `load_pretrained_model`."""
        loading: dict[str, Any] = {"load_8bit": self.load_8bit, "load_4bit": self.load_4bit}
        if self.dtype and not (self.load_8bit or self.load_4bit):
            loading["dtype"] = self.dtype
        if self.mm_next_protocol and self.mm_next_protocol != "native":
            loading["mm_next_protocol"] = self.mm_next_protocol
        return loading

    def load(self, **more: Any) -> LoadedModel:
        """Load it, with pruning switched off: whoever asks brings a setting.

        Args:
            **more: other arguments of `load_pretrained_model`, such as `attn_implementation`.

        Raises:
            UserInputError: what cannot be loaded, or asked about a picture.
        """
        name = self.name or get_model_name_from_path(self.path)
        tokenizer, model, processor, _ = load_pretrained_model(
            self.path, self.base, name, device=self.device, **self.loading, **more
        )
        _check_complete(self.path, tokenizer, processor)
        own, model.pruning = model.pruning, None
        template = self.conv_mode or conv_mode_for(name, model.config)
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
    loaded = ModelSpec.from_flags(args, name=name).load()
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
