"""A checkpoint of any family, not loaded: where it is and how it is loaded and asked."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.command_line import check_conv_mode
from llava.conversation import conv_mode_for
from llava.families.checkpoints import family_of_config, load_checkpoint, template_word
from llava.families.contract import VisionLanguageModel
from llava.families.family import Family
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import checkpoint_here, local_checkpoint, read_config
from llava.model.loaded import LoadedModel
from llava.pruning.flags import pruning_from
from llava.utils import UserInputError

# LLaVA's evaluation scripts ask the checkpoints of its demo with a template of their own.
_EVALUATION_TEMPLATES = {"llava_v1": "vicuna_v1"}


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
        found = replace(self, path=str(find(self.path) or self.path))
        found.check_family()
        if self.base is None:
            return found
        return replace(found, base=str(find(self.base) or self.base))

    @property
    def family(self) -> type[Family] | None:
        """The family of the checkpoint; None if it is native, or a hub name that is not here.

        Raises:
            UserInputError: a config.json that cannot be read.
        """
        folder = Path(self.path)
        if not (folder / "config.json").is_file():
            return None
        return family_of_config(read_config(folder), self.path)

    def check_family(self) -> None:
        """Refuse settings that only LLaVA's own checkpoints have.

        Raises:
            UserInputError: names the flag.
        """
        protocol = None if self.mm_next_protocol == "native" else self.mm_next_protocol
        given = {
            "--conv-mode": (self.conv_mode, "it is asked in its own chat template"),
            "--model-base": (self.base, "it is complete by itself"),
            "--mm-next-protocol": (protocol, "it counts tokens as its own processor does"),
        }
        own = [(flag, why) for flag, (value, why) in given.items() if value is not None]
        if own and self.family is not None:
            (flag, why), *_ = own
            raise UserInputError(
                f"{flag} is for LLaVA checkpoints, and {self.path} is a {self.family.name}: {why}; "
                f"leave {flag} out"
            )

    @property
    def own_template(self) -> str:
        """The conversation template that the checkpoint was trained with."""
        folder = Path(self.path)
        if self.family is not None:
            return template_word(folder)
        config = read_config(folder) if folder.is_dir() else None
        return conv_mode_for(get_model_name_from_path(self.path), config)

    @property
    def evaluation_template(self) -> str:
        """The template that benchmarks ask with: the flags', else that of LLaVA's scripts."""
        own = self.own_template
        return self.conv_mode or _EVALUATION_TEMPLATES.get(own, own)

    def asked_in(self, template: str) -> ModelSpec:
        """Return the same, asked in a template; a model of a family has one alone."""
        return self if self.family is not None else replace(self, conv_mode=template)

    @property
    def loading(self) -> dict[str, Any]:
        """More arguments of `load_pretrained_model`."""
        loading: dict[str, Any] = {"load_8bit": self.load_8bit, "load_4bit": self.load_4bit}
        if self.dtype and not (self.load_8bit or self.load_4bit):
            loading["dtype"] = self.dtype
        if self.mm_next_protocol and self.mm_next_protocol != "native":
            loading["mm_next_protocol"] = self.mm_next_protocol
        return loading

    def load(self, **more: Any) -> VisionLanguageModel:
        """Load it, with pruning switched off: whoever asks brings a setting.

        Args:
            **more: other arguments of `load_pretrained_model`, such as `attn_implementation`.

        Raises:
            UserInputError: what cannot be loaded, or asked about a picture.
        """
        name = self.name or get_model_name_from_path(self.path)
        # With a base, the path is a part of a LLaVA; a family's checkpoint is then refused.
        spec = self if self.base else replace(self, path=str(local_checkpoint(self.path)))
        spec.check_family()
        family = spec.family
        if family is not None:
            dtype = None if self.load_8bit or self.load_4bit else self.dtype
            return load_checkpoint(
                family,
                Path(spec.path),
                read_config(Path(spec.path)),
                name=name,
                device=self.device,
                dtype=dtype,
                load_8bit=self.load_8bit,
                load_4bit=self.load_4bit,
                **more,
            )
        tokenizer, model, processor, _ = load_pretrained_model(
            self.path, self.base, name, device=self.device, **self.loading, **more
        )
        _check_complete(self.path, tokenizer, processor)
        own, model.pruning = model.pruning, None
        template = self.conv_mode or conv_mode_for(name, model.config)
        return LoadedModel(model.eval(), tokenizer, processor, template, own, name)


def load_from_flags(args: argparse.Namespace, name: str | None = None) -> VisionLanguageModel:
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
    spec = ModelSpec.from_flags(args, name=name)
    loaded = spec.load()
    loaded.pruning = loaded.own_pruning if pruning is None else pruning
    if spec.conv_mode is not None:
        own = conv_mode_for(loaded.name, loaded.model.config)
        if spec.conv_mode != own:
            print(
                f"note: --conv-mode {spec.conv_mode} replaces {own}, this model's own",
                file=sys.stderr,
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
