"""A LLaVA ready to be asked, as everything above knows it (`llava.families.contract`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from llava.command_line import check_chat_template, check_conv_mode
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for, conv_templates
from llava.families.checkpoints import family_of_config, load_checkpoint, template_word
from llava.families.contract import EncodedImages, ModelInputs, Picture, VisionLanguageModel
from llava.families.dialogue import Dialogue
from llava.families.family import Family
from llava.families.lengths import (
    Limit,
    PromptLength,
    context_limits,
    measure_prompt,
    prompt_limit,
)
from llava.mm_utils import get_model_name_from_path, process_images, tokenize_pieces
from llava.model.between_layers import (
    decoder_setting,
    generating_between_layers,
    reading_columns,
)
from llava.model.builder import load_pretrained_model
from llava.model.call_context import asking, padding_side
from llava.model.checkpoint import checkpoint_here, local_checkpoint, read_config
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.prompt_inputs import add_prompts, needed_of_question
from llava.model.prompting import prompt_pieces, render
from llava.model.types import Images
from llava.model.vision_inputs import count_visual_tokens
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.flags import pruning_from
from llava.pruning.tokens import ImageTokens, VisualTokens
from llava.utils import UserInputError

# LLaVA's evaluation scripts ask the checkpoints of its demo with a template of their own.
_EVALUATION_TEMPLATES = {"llava_v1": "vicuna_v1"}
_PIXELS = "pixels"  # in `Picture.inputs`


@dataclass(frozen=True)
class Preparation:
    """Makes a `Picture` of an image as a model's config says.

    Attributes:
        processor: the tower's image processor.
        config: the model's.
    """

    processor: Any
    config: Any

    def __call__(self, image: Image.Image) -> Picture:
        """Return pixels [3, H, W], or [T, 3, H, W] where images are tiles."""
        pixels = process_images([image], self.processor, self.config)[0]
        return Picture({_PIXELS: pixels}, image.size)


@dataclass
class LoadedModel:
    """A LLaVA and what it takes to ask it about pictures: a `VisionLanguageModel`.

    Attributes:
        model, tokenizer, image_processor: as from `load_pretrained_model`.
        template: key of `conv_templates`.
        own_pruning: the setting that the checkpoint was saved with.
        name: what the model is called.

    Raises:
        UserInputError: a template without turns.
    """

    model: LlavaCausalLM
    tokenizer: Any
    image_processor: Any
    template: str
    own_pruning: PruningConfig | None = None
    name: str = ""

    def __post_init__(self) -> None:
        check_chat_template(self.template)

    @property
    def pruning(self) -> PruningConfig | None:
        return self.model.pruning

    @pruning.setter
    def pruning(self, value: PruningConfig | None) -> None:
        self.model.pruning = value

    @property
    def roles(self) -> tuple[str, str]:
        return conv_templates[self.template].roles

    @property
    def limits(self) -> list[Limit]:
        return context_limits(self.model.config)

    @property
    def prepare(self) -> Preparation:
        return Preparation(self.image_processor, self.model.config)

    def encode(
        self, pictures: Sequence[Picture], needs: Iterable[str] | None = None
    ) -> VisualTokens:
        return self.model.encode_visual_tokens(_batch(pictures), _sizes(pictures), needs)

    def decoder_layers(self) -> DecoderLayers:
        return TransformersDecoder(self.model.get_model())

    def reads_question(self, config: PruningConfig | None) -> bool:
        tower = self.model.get_vision_tower()
        return tower is not None and bool(needed_of_question(config, tower))

    def with_questions(self, visual: EncodedImages, questions: Sequence[str]) -> VisualTokens:
        return self.model.with_questions(_of_one_grid(visual), questions)

    def place(
        self,
        visual: EncodedImages,
        rows: Sequence[torch.Tensor],
        questions: Sequence[str] | None = None,
    ) -> VisualTokens:
        with asking(questions):
            return add_prompts(self.model, _of_one_grid(visual), rows)

    def prune(self, visual: EncodedImages) -> ImageTokens:
        return self.model.prune_visual_tokens(_of_one_grid(visual))

    def render(self, dialogue: Dialogue) -> str:
        return render(dialogue, self.template, self.model.config)

    def row(self, dialogue: Dialogue) -> torch.Tensor:
        pieces = prompt_pieces(dialogue, self.template, self.model.config)
        ids = tokenize_pieces(pieces, self.tokenizer)
        return torch.tensor(ids, dtype=torch.long, device=self.model.device)

    def measure(
        self, row: torch.Tensor, pictures: Sequence[Picture], *, give_way: bool = False
    ) -> PromptLength:
        visual = count_visual_tokens(self.model, _batch(pictures), _sizes(pictures))
        text = int((row != IMAGE_TOKEN_INDEX).sum())
        limit = prompt_limit(self.limits) if give_way else None
        return measure_prompt(visual, text, self.pruning, limit)

    def splice(self, visual: ImageTokens | None, rows: Sequence[torch.Tensor]) -> ModelInputs:
        ids, mask = _pad(rows)
        columns: list[VisualColumns] = []
        with padding_side("left"), reading_columns(decoder_setting(self.model), columns):
            positions, merged, embeds, _ = self.model.splice_visual_tokens(
                visual, ids, torch.zeros_like(ids), mask
            )
        assert merged is not None  # because a mask went in
        return ModelInputs(embeds, merged, positions, columns=columns[0] if columns else None)

    def generate(self, inputs: ModelInputs, **settings: Any) -> torch.Tensor:
        if inputs.positions is not None:
            settings["position_ids"] = inputs.positions
        columns = [] if inputs.columns is None else [inputs.columns]
        setting = decoder_setting(self.model)
        with generating_between_layers(self.model, setting, columns, settings):
            output: Any = GenerationMixin.generate(
                self.model,
                inputs_embeds=inputs.embeds,
                attention_mask=inputs.mask,
                **settings,
            )
        return output

    def answer(
        self,
        rows: Sequence[torch.Tensor],
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        strict: bool = False,
        **settings: Any,
    ) -> torch.Tensor:
        ids, mask = _pad(rows)
        shown: dict[str, Any] = {"images": None}
        if pictures:
            shown = {"images": _batch(pictures), "image_sizes": _sizes(pictures)}
        return self.model.generate(
            inputs=ids,
            attention_mask=mask,
            questions=questions,
            strict=strict,
            **shown,
            **settings,
        )


def _of_one_grid(visual: EncodedImages) -> VisualTokens:
    assert isinstance(visual, VisualTokens)  # LLaVA's tower sees squares of one size
    return visual


def _batch(pictures: Sequence[Picture]) -> Images:
    """Return the pixels of pictures in the form that `encode_visual_tokens` takes."""
    pixels = [picture.inputs[_PIXELS] for picture in pictures]
    same = all(one.shape == pixels[0].shape for one in pixels)
    return torch.stack(pixels) if same else pixels


def _sizes(pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    return [picture.size for picture in pictures]


def _pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, L] and mask [B, L] of rows, padded on the right; the splice pads again."""
    mask = [torch.ones_like(row) for row in rows]
    return pad_sequence([*rows], batch_first=True), pad_sequence(mask, batch_first=True)


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
