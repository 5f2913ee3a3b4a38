"""A checkpoint of one of the families, ready to be asked: `contract.VisionLanguageModel`.

Template, tokenizer and image processor are the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.families.between_layers import (
    LayerPruning,
    between_layers,
    check_layers,
    goes_on,
    visual_columns,
)
from llava.families.call_state import inside_generate
from llava.families.contract import ModelInputs, Picture
from llava.families.dialogue import IMAGE, Dialogue, Turn
from llava.families.family import Family
from llava.families.generate_settings import check_settings_between_layers
from llava.families.lengths import Limit, PromptLength, context_limits, measure_prompt
from llava.families.prompts import ImageColumns, Prompts, prune_prompts
from llava.families.questions import add_questions, needed_of_question
from llava.families.splicing import splice
from llava.images import PictureError
from llava.model.call_context import asking, call_context
from llava.model.splice import share_images
from llava.pruning.active import attach, detach, holding, record
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.ragged import RaggedTokens
from llava.pruning.stage import prune_visual_tokens
from llava.pruning.tokens import ImageTokens, VisualTokens
from llava.utils import UserInputError
from llava.value_rules import library_errors


@dataclass(frozen=True)
class FamilyPreparation:
    """Makes a `Picture` of an image with a checkpoint's own processor.

    Attributes:
        processor: the image processor.
        settings: more arguments of it.
    """

    processor: Any
    settings: Mapping[str, Any]

    def __call__(self, image: Image.Image) -> Picture:
        """Return what the processor makes of one image.

        Raises:
            PictureError: the processor does not take it, as where it is too narrow.
        """
        try:
            made = self.processor(images=image.convert("RGB"), return_tensors="pt", **self.settings)
        except ValueError as error:
            raise PictureError(f"the model's image processor refuses it: {error}") from error
        return Picture({k: v for k, v in made.items() if isinstance(v, Tensor)}, image.size)


@dataclass
class FamilyModel:
    """A model of a family and what it takes to ask it about pictures.

    Attributes:
        family: of the model.
        model: transformers' own.
        tokenizer, image_processor: the checkpoint's.
        chat_template: its template.
        own_pruning: the setting that the checkpoint was saved with.
        name: what the model is called.
    """

    family: Family
    model: Any
    tokenizer: Any
    image_processor: Any
    chat_template: str
    own_pruning: PruningConfig | None = None
    name: str = ""

    @property
    def _target(self) -> Any:
        return self.family.attachment(self.model)

    @property
    def pruning(self) -> PruningConfig | None:
        setting: PruningConfig | None = self._target.pruning
        return setting

    @pruning.setter
    def pruning(self, value: PruningConfig | None) -> None:
        if value is None:
            detach(self.model)
        else:
            attach(self.model, value)

    @property
    def roles(self) -> tuple[str, str]:
        return "user", "assistant"

    @property
    def limits(self) -> list[Limit]:
        return context_limits(self.model.config.get_text_config())

    @property
    def prepare(self) -> Callable[[Image.Image], Picture]:
        return FamilyPreparation(self.image_processor, self.family.processing)

    def encode(self, pictures: Sequence[Picture], needs: Iterable[str] | None = None) -> Any:
        check_layers(self.family, self.model, self.pruning, None)
        if needs is None:
            needs = () if self.pruning is None else self.pruning.pruner.collects
        inputs, ids = self._inputs(pictures)
        device, dtype = self.model.device, self.model.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        with self._target.installed():
            visual = self.family.encode(self.model, inputs, ids, set(needs))
        sizes = [picture.size for picture in pictures]
        if isinstance(visual, RaggedTokens):
            groups = tuple(
                self._located(group, [sizes[image] for image in visual.images_of(number)])
                for number, group in enumerate(visual.encoded)
            )
            return replace(visual, groups=groups)
        return self._located(visual, sizes)

    def _located(self, visual: VisualTokens, sizes: Sequence[tuple[int, int]]) -> VisualTokens:
        """Add to tokens what part of a picture of (width, height) pixels each of them shows."""
        if visual.layouts is None:
            return visual
        layouts = zip(visual.layouts, sizes, strict=True)
        located = tuple(self.family.located(self.model, own, size) for own, size in layouts)
        return replace(visual, layouts=located)

    def decoder_layers(self) -> DecoderLayers:
        return self.family.decoder_layers(self.model)

    def reads_question(self, config: PruningConfig | None) -> bool:
        return bool(needed_of_question(self.family, self.model, config))

    def with_questions(self, visual: Any, questions: Sequence[str]) -> Any:
        with asking(questions):
            count = visual.num_images
            return add_questions(self.family, self.model, visual, range(count), count)

    def place(
        self, visual: Any, rows: Sequence[Tensor], questions: Sequence[str] | None = None
    ) -> Any:
        shares = share_images(rows, visual.num_images)
        if self.family.lone_images is not None and max(map(len, shares)) > 1:
            raise UserInputError(
                f"{self.name!r} can be asked about one image a prompt only: "
                f"{self.family.lone_images}; ask with its own processor and llava.pruning.prune"
            )
        owners = [row for row, share in enumerate(shares) for _ in share]
        with asking(questions):
            return self.family.with_prompts(self.model, visual, owners, len(rows))

    def prune(self, visual: Any) -> ImageTokens:
        pruned = prune_visual_tokens(visual, self.pruning)
        record(self._target, pruned, partial(self.family.located, self.model))
        return pruned

    def render(self, dialogue: Dialogue) -> str:
        return self._rendered(dialogue).replace(self.mark, DEFAULT_IMAGE_TOKEN)

    def _rendered(self, dialogue: Dialogue) -> str:
        """Write a dialogue in the checkpoint's template, which marks images in its own way.

        Raises:
            UserInputError: the template cannot be used, or a text holds the token that stands for
                images.
        """
        messages: list[dict[str, Any]] = []
        if dialogue.system is not None:
            messages.append({"role": "system", "content": self._content((dialogue.system,))})
        for number, turn in enumerate(dialogue.turns):
            messages.append({"role": self.roles[number % 2], "content": self._content(turn)})
        with library_errors(
            f"the chat template of {self.name!r} cannot be used",
            "put the chat_template.jinja of the released checkpoint into its folder",
        ):
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=dialogue.is_open,
            )
        return rendered

    def _content(self, turn: Turn) -> list[dict[str, str]]:
        """Return a turn as the parts of a message.

        A line break right behind an image is LLaVA's way to lay out prompts; other templates place
        images in their own, so it is left out.
        """
        content: list[dict[str, str]] = []
        for part in turn:
            if part is IMAGE:
                content.append({"type": "image"})
                continue
            text, last = str(part), content[-1]["type"] if content else None
            if self.mark in text:
                raise UserInputError(
                    f"the text holds {self.mark!r}, which stands for images in prompts of this "
                    "model; remove it"
                )
            if last == "image":
                text = text.removeprefix("\n")
            if last == "text":
                content[-1]["text"] += text
            elif text:
                content.append({"type": "text", "text": text})
        return content

    def row(self, dialogue: Dialogue) -> Tensor:
        text = self._rendered(dialogue)
        bos = self.tokenizer.bos_token
        begins = bos is not None and text.startswith(bos)
        ids = self.tokenizer(text, add_special_tokens=not begins)["input_ids"]
        wanted = sum(part is IMAGE for turn in dialogue.turns for part in turn)
        mark = self.family.placeholders(self.model)[0]
        if ids.count(mark) != wanted:
            raise UserInputError(
                f"the chat template of {self.name!r} writes {ids.count(mark)} image tokens for "
                f"{wanted} images; use the template of the released checkpoint"
            )
        before, after = self.family.frame(self.tokenizer)
        image = [*before, IMAGE_TOKEN_INDEX, *after]
        row = [own for token in ids for own in (image if token == mark else [token])]
        return torch.tensor(row, dtype=torch.long, device=self.model.device)

    def measure(
        self, row: Tensor, pictures: Sequence[Picture], *, give_way: bool = False
    ) -> PromptLength:
        # Nothing cuts prompts of these models, so nothing gives way.
        inputs, ids = self._inputs(pictures)
        visual = self.family.outline(self.model, inputs, ids)
        text = int((row != IMAGE_TOKEN_INDEX).sum())
        length = measure_prompt(visual, text, self.pruning)
        # M-RoPE gives an image fewer positions than it has tokens.
        return length if self.family.axes == 1 else length._replace(positions=length.total)

    def splice(self, visual: Any, rows: Sequence[Tensor]) -> ModelInputs:
        count, geometry = 0, {}
        if visual is not None:
            visual.settle()
            count, geometry = visual.num_images, self.family.geometry(self.model, visual)
        lengths = [visual.sequence(image).total for image in range(count)]
        own = [row.cpu() for row in rows]
        parts = [
            self._written_out(row, [lengths[image] for image in share])
            for row, share in zip(own, share_images(own, count), strict=True)
        ]
        ids = pad_sequence([part for part, _ in parts], batch_first=True, padding_side="left")
        present = [torch.ones_like(part, dtype=torch.bool) for part, _ in parts]
        mask = pad_sequence(present, batch_first=True, padding_side="left")
        images = [
            ImageColumns(row, columns + ids.shape[1] - len(part))
            for row, (part, found) in enumerate(parts)
            for columns in found
        ]
        positions = self.family.positions(self.model, geometry, ids, mask)
        whole = Prompts(ids, mask, images, positions)
        pruned = prune_prompts(whole, visual, "left")
        spliced = splice(self.family, self.model, ids.to(self.model.device), pruned, visual)
        columns = None if self._decoder is None else visual_columns(whole, visual, pruned)
        return ModelInputs(
            spliced.embeds, spliced.mask.long(), spliced.position_ids, spliced.deep, columns
        )

    def generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        if inputs.positions is not None:
            settings["position_ids"] = inputs.positions
        module, layers = self.family.language_model(self.model), self._layers(inputs, settings)
        with self._target.installed(), inside_generate(self._target, module, inputs.deep), layers:
            output: Any = type(self.model).generate(
                self.model, inputs_embeds=inputs.embeds, attention_mask=inputs.mask, **settings
            )
        return output

    @property
    def _decoder(self) -> DecoderConfig | None:
        """What the setting that counts for the caller drops between layers."""
        setting = self.pruning
        return None if setting is None else setting.decoder

    def _layers(
        self, inputs: ModelInputs, settings: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Prune prompts of one `generate` call between layers inside, or go on from such."""
        decoder = self._decoder
        if not goes_on(settings.get("past_key_values")) and decoder is None:
            return nullcontext()
        check_settings_between_layers(self.model, settings)
        layers = LayerPruning(decoder, inputs.columns)
        return between_layers(self._target, layers, generating=True)

    def answer(
        self,
        rows: Sequence[Tensor],
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        strict: bool = False,
        **settings: Any,
    ) -> Tensor:
        if strict and len(rows) > 1:
            return self._answer_alone(rows, pictures, questions, **settings)
        runner = call_context().run_step

        def run(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
            return step(*arguments) if runner is None else runner(name, step, *arguments)

        with torch.no_grad(), holding(self._target):
            visual = None
            if pictures:
                visual = run("encode", self.encode, pictures)
                visual = run("prune", self.prune, self.place(visual, rows, questions))
            return self.generate(self.splice(visual, rows), **settings)

    def _answer_alone(
        self,
        rows: Sequence[Tensor],
        pictures: Sequence[Picture],
        questions: Sequence[str],
        **settings: Any,
    ) -> Tensor:
        """Answer the prompts one by one: [B, new], padded with the pad token."""
        shares = share_images(rows, len(pictures))
        answers = [
            self.answer([row], [pictures[i] for i in share], [question], **settings)[0]
            for row, share, question in zip(rows, shares, questions, strict=True)
        ]
        padding = settings.get("pad_token_id") or self.model.generation_config.pad_token_id or 0
        return pad_sequence(answers, batch_first=True, padding_value=padding)

    @property
    def mark(self) -> str:
        """The token that stands for a token of an image."""
        token: str = self.tokenizer.convert_ids_to_tokens(self.family.placeholders(self.model)[0])
        return token

    def _inputs(self, pictures: Sequence[Picture]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return pictures as arguments of the model, and ids [1, L] that hold nothing but them."""
        marks = self.family.placeholders(self.model)[:1]
        row: list[int] = []
        for picture in pictures:
            row += marks * self.family.count(self.model, picture.inputs) + [marks[0] - 1]
        inputs = self.family.collate([picture.inputs for picture in pictures])
        return inputs, torch.tensor([row])

    def _written_out(self, row: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Write out the images of a prompt.

        Args:
            row: ids [L] with a mark for every image, on the CPU.
            lengths: tokens of each.

        Returns:
            Ids [L'] with a placeholder for every token, and the columns of every image.
        """
        placeholder = self.family.placeholders(self.model)[:1]
        ids: list[int] = []
        images = []
        left = iter(lengths)
        for token in row.tolist():
            if token != IMAGE_TOKEN_INDEX:
                ids.append(token)
                continue
            length = next(left)
            images.append(torch.arange(length) + len(ids))
            ids += placeholder * length
        return torch.tensor(ids), images
