"""What is the same in all families, and what a file of a family says of its models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from llava.families.attachment import Attachment
from llava.families.calls import takes_embeddings
from llava.families.capture import Capture, capturing
from llava.families.prompts import ImageColumns, find_images, text_positions
from llava.families.questions import add_questions
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.lookup import FAMILIES
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens

register = FAMILIES.register

# Arguments that bring videos.
_VIDEO = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")

_NOTHING = nn.Identity()

_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
_lock = Lock()


class Family:
    """Models of a few classes that differ in sizes alone. Objects have no state.

    A file of a family defines `encode` or what it calls, and `lengths`; everything else has a
    default for models made of `get_image_features`, a projector and a language model that reads
    positions 0, 1, 2, ...

    Attributes:
        name: what it is registered as.
        classes: names of the transformers classes.
        pixels: arguments of `forward` that bring images; they go once the images are embedded.
        shown: those of them that hold pictures, without which a call has none; the first of
            `pixels` where no class of the family says it.
        processing: arguments that the family's processor gives its image processor.
        axes: how many numbers say where a token stands: 1, or M-RoPE's 3.
        unasked: what prompts of the family do that only its processor can, so that
            `loaded.FamilyModel` cannot ask its models; None if it can.
        lone_images: why it asks about one image a prompt only; None if about several.
    """

    name: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ()
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values",)
    shown: ClassVar[tuple[str, ...]] = ("pixel_values",)
    processing: ClassVar[Mapping[str, Any]] = {}
    axes: ClassVar[int] = 1
    unasked: ClassVar[str | None] = None
    lone_images: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.shown is Family.shown:
            cls.shown = cls.pixels[:1]
        if not cls.shown or not {*cls.shown} <= {*cls.pixels}:
            raise PruningError(
                f"{cls.__name__}.shown is {cls.shown} but {cls.__name__}.pixels is {cls.pixels}; "
                "name some of `pixels` in `shown`"
            )

    @classmethod
    def attachment(cls, model: Any) -> Attachment:
        """Return what stands between callers and `model`, the same at every call."""
        with _lock:
            known = _attachments.get(model)
            if known is None:
                known = _attachments[model] = Attachment(model, cls())
            return known

    # --- where things are ---

    def projector(self, model: Any) -> nn.Module:
        """Return the module that maps features to what the language model reads."""
        raise NotImplementedError

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower."""
        raise NotImplementedError

    def language_model(self, model: Any) -> nn.Module:
        """Return the language model without its output layer."""
        module: nn.Module = model.model.language_model
        return module

    def decoder_layers(self, model: Any) -> DecoderLayers:
        """Return the layers of the language model, between which tokens can be dropped.

        Raises:
            PruningError: they cannot be dropped there.
        """
        return TransformersDecoder(self.language_model(model))

    def hands_over(self, model: Any) -> bool:
        """Return whether the language model must be handed what its model does not pass on."""
        return not takes_embeddings(model)

    def placeholders(self, model: Any) -> list[int]:
        """Return the ids of the tokens that stand for an image in a prompt."""
        return [model.config.image_token_id]

    # --- what it computes ---

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        """Count the tokens of every image of a call without computing any.

        Args:
            model: of this family.
            inputs: the arguments named in `pixels`.
            ids: LongTensor [B, L] of the prompts, on the CPU.
        """
        raise NotImplementedError

    def find(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor
    ) -> list[ImageColumns]:
        """Find the columns of every image of a call.

        Args:
            model, inputs, ids: as in `lengths`.
            mask: BoolTensor [B, L] on the CPU, False for padding.

        Raises:
            PruningError: placeholders and images do not match.
        """
        return find_images(ids, mask, self.placeholders(model), self.lengths(model, inputs, ids))

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> Any:
        """Run the vision side of a model over the images of a call.

        Args:
            model, inputs, ids: as in `lengths`.
            needs: names of what the pruning method reads beyond tokens, see
                `VisualTokens.extras`.

        Returns:
            VisualTokens, or RaggedTokens for images of different grids.

        Raises:
            PruningError: the model has no such thing.
        """
        raise NotImplementedError

    def positions(self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """Return the positions of the unpruned prompts: LongTensor [A, B, L] on the CPU.

        A is 1, or 3 for M-RoPE's times, rows and columns. Padding may have any.

        Args:
            model: of this family.
            inputs: all arguments of the call.
            ids, mask: [B, L] of the prompts on the CPU.
        """
        return text_positions(mask)

    def position_ids(self, positions: Tensor, mask: Tensor) -> Tensor:
        """Return positions [A, B, L] of pruned prompts as the model takes them."""
        if positions.shape[0] == 1:
            return positions[0]
        # The first row is the one that masks are made by.
        return torch.cat([text_positions(mask), positions])

    def located(self, model: Any, layout: ImageLayout, size: tuple[int, int]) -> ImageLayout:
        """Return the layout of a picture of (width, height) pixels, with what its tiles show of it.

        By default the one tile of an image shows all of it; what several show is not known.
        """
        if layout.tiles > 1:
            return layout
        return replace(layout, base_box=(0.0, 0.0, float(size[0]), float(size[1])))

    # --- how a checkpoint of the family is asked, see `loaded.FamilyModel` ---

    def collate(self, pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Put what the processor made of single images together, as it does for several.

        Images of fewer tiles are padded with zeros to the most.
        """
        return {name: _stack([own[name] for own in pictures]) for name in pictures[0]}

    def count(self, model: Any, inputs: Mapping[str, Any]) -> int:
        """Count the tokens of one image from what the processor made of it.

        Raises:
            PruningError: prompts of the family cannot be written here.
        """
        if self.unasked is not None:
            raise PruningError(self.refusal())
        given = {name: inputs.get(name) for name in self.pixels}
        return sum(self.lengths(model, given, torch.zeros(1, 0, dtype=torch.long)))

    @classmethod
    def refusal(cls) -> str:
        """Return why models of the family are not asked here, see `unasked`."""
        return (
            f"prompts of {cls.name} models {cls.unasked}, which only their processor does; prune "
            "model.generate(**processor_output) instead: with prune(model, ...): ..."
        )

    def outline(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> Any:
        """Return the images of a call as `encode` would, with embeddings of width 0."""
        given = {name: inputs.get(name) for name in self.pixels}
        return outline_of(self.lengths(model, given, ids))

    def frame(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Return the ids that the processor writes before and after the tokens of an image.

        Only those that the chat template leaves to it.
        """
        return [], []

    def geometry(self, model: Any, visual: Any) -> dict[str, Any]:
        """Return the arguments that `positions` reads, of images that were encoded or pruned."""
        return {}

    def with_prompts(self, model: Any, visual: Any, rows: Sequence[int], prompts: int) -> Any:
        """Add what prompts say of their images: their places and, if it is read, the question.

        Args:
            model: of this family.
            visual: its encoded images.
            rows: the row of every image.
            prompts: how many rows there are.
        """
        if visual.extras:
            places = [rows[:number].count(row) for number, row in enumerate(rows)]
            visual = visual.with_extras({"image_position": places})
        firsts = [number for number, row in enumerate(rows) if row not in rows[:number]]
        shares = tuple(range(first, first + rows.count(rows[first])) for first in firsts)
        return add_questions(self, model, replace(visual, shares=shares), rows, prompts)

    def text_tower(self, model: Any) -> Any:
        """Return the vision tower whose text tower came with it (CLIP), or None."""
        return None

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuse arguments whose images cannot be pruned.

        Raises:
            PruningError: names them.
        """
        moving = [
            name for name in _VIDEO if inputs.get(name) is not None and name not in self.pixels
        ]
        if moving:
            raise PruningError(
                f"videos of {self.name} models cannot be pruned ({', '.join(moving)}); switch "
                "pruning off for this call: with prune(model): ..."
            )

    # --- shared steps ---

    def run_vision(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        capture: Capture | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        """Run `get_image_features` with those of `inputs` that are named in `pixels`.

        Args:
            model, inputs: as in `encode`.
            capture: what is read on the way.

        Returns:
            As `run_captured`.
        """
        given = {name: inputs[name] for name in self.pixels if inputs.get(name) is not None}
        features = model.model.get_image_features
        return self.run_captured(model, partial(features, **given, return_dict=True), capture)

    def run_captured(
        self, model: Any, function: Callable[[], Any], capture: Capture | None = None
    ) -> tuple[Any, Tensor, Tensor]:
        """Run the model's own function that makes tokens of images or frames.

        Args:
            model: of this family.
            function: `get_image_features` or one like it, with its arguments.
            capture: what is read on the way.

        Returns:
            What it returned, and input and output of the projector.

        Raises:
            PruningError: the projector did not run exactly once.
        """
        capture = Capture() if capture is None else capture
        # Where weights are offloaded, those of no module of their own come back for the call.
        with capturing(capture), align_module_device(model.model):
            output = function()
        if len(capture.projections) != 1:
            raise PruningError(
                f"the projector of {type(model).__name__} ran {len(capture.projections)} times for "
                "one call of the class; only models that project all images at once can be pruned"
            )
        ((features, projected),) = capture.projections
        return output, features.to(projected.device), projected

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        """Return the language model's embeddings [B, L, D] of ids."""
        table = model.get_input_embeddings()
        embedded: Tensor = table(ids)
        return embedded


def outline_of(lengths: Sequence[int]) -> RaggedTokens:
    """Return images of so many tokens, of which nothing else is known: embeddings of width 0."""
    first = torch.zeros(1, dtype=torch.long)
    nothing = [torch.zeros(1, length, 0) for length in lengths]
    return RaggedTokens.of(
        [VisualTokens(own, own, _NOTHING, first, (1, own.shape[1])) for own in nothing]
    )


def misfit(one: str, other: str) -> PruningError:
    """Return the error for arguments of a call that do not belong together."""
    return PruningError(
        f"{one}, but {other}; make input_ids and pixels with one call of the model's processor"
    )


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Join tensors [1, ...] along their first axis; the second is padded where it differs."""
    if any(part.ndim > 1 and part.shape[2:] != parts[0].shape[2:] for part in parts):
        raise PruningError(
            f"images of one batch come as {[[*part.shape] for part in parts]}, which do not fit "
            "together; ask about them one by one"
        )
    if parts[0].ndim < 3 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat([*parts])
    most = max(part.shape[1] for part in parts)
    return torch.cat(
        [
            torch.cat([part, part.new_zeros(1, most - part.shape[1], *part.shape[2:])], dim=1)
            for part in parts
        ]
    )
