"""A LLaVA ready to be asked, as everything above knows it (`llava.families.contract`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from llava.command_line import check_chat_template
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.families.contract import EncodedImages, ModelInputs, Picture
from llava.families.dialogue import Dialogue
from llava.families.lengths import (
    Limit,
    PromptLength,
    context_limits,
    measure_prompt,
    prompt_limit,
)
from llava.mm_utils import process_images, tokenize_pieces
from llava.model.between_layers import (
    decoder_setting,
    generating_between_layers,
    reading_columns,
)
from llava.model.call_context import asking, padding_side
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.prompt_inputs import add_prompts, needed_of_question
from llava.model.prompting import prompt_pieces, render
from llava.model.types import Images
from llava.model.vision_inputs import count_visual_tokens
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.tokens import ImageTokens, VisualTokens

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
