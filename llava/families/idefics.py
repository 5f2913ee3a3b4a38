"""Idefics3 and SmolVLM: tiles between words, patches joined to tokens (pixel shuffle), one matrix.

The prompt names every tile (its row and column, or that it is the whole image), so the columns of
an image are not in one piece. The whole image is its last tile. Frames of videos come as images of
one tile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.families.family import Family, register
from llava.families.prompts import find_runs, mismatch
from llava.families.towers import EncoderReadings, digests, pool_readings, square_tiles
from llava.pruning.errors import PruningError
from llava.pruning.tokens import ENCODER_EXTRAS, VisualTokens


@register
class Idefics3(Family):
    """`HuggingFaceM4/Idefics3-*` and `HuggingFaceTB/SmolVLM-*`."""

    name: ClassVar[str] = "idefics3"
    classes: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration",)
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    unasked: ClassVar[str | None] = "name every tile of an image"

    def projector(self, model: Any) -> nn.Module:
        connector: nn.Module = model.model.connector
        return connector

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = model.model.vision_model.encoder.layers
        return layers

    def language_model(self, model: Any) -> nn.Module:
        module: nn.Module = model.model.text_model
        return module

    def tile_counts(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        """Count the tiles of every image.

        Raises:
            PruningError: the placeholders are not those of the tiles.
        """
        each, counts, lengths = len(_groups(model)), [], []
        for row in ids:
            runs = find_runs(row == model.config.image_token_id)
            lengths += [length for _, length in runs]
            # The id before a tile is its name; the last tile of an image is the whole image.
            names = [int(row[max(start - 1, 0)]) for start, _ in runs]
            ends = [place for place, name in enumerate(names) if name == names[-1]]
            counts += [end - start for start, end in pairwise([-1, *ends])]
        total = int(_shown(inputs["pixel_values"]).sum())
        if len(lengths) != total or any(length != each for length in lengths):
            # What it calls images are their tiles.
            raise mismatch(sum(lengths), total, each * total)
        return counts

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        each = len(_groups(model))
        return [count * each for count in self.tile_counts(model, inputs, ids)]

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens:
        _refuse_padding(inputs.get("pixel_attention_mask"), needs)
        counts, groups = self.tile_counts(model, inputs, ids), _groups(model)
        pixels = inputs["pixel_values"]
        layers, connector = self.blocks(model), model.model.connector
        readings = EncoderReadings(layers, len(layers), 0, needs)
        _, patches, projected = self.run_vision(model, inputs, readings.capture())
        found = pool_readings(readings.extras(len(projected)), groups)
        return square_tiles(
            counts,
            round(len(groups) ** 0.5),
            connector.pixel_shuffle(patches, connector.scale_factor),
            projected,
            projector=connector.modality_projection,
            extras={**found, **digests(pixels[_shown(pixels)], needs)},
            class_token=False,
        )


@register
class SmolVLM(Idefics3):
    """`HuggingFaceTB/SmolVLM2-*`, in classes of their own."""

    name: ClassVar[str] = "smolvlm"
    classes: ClassVar[tuple[str, ...]] = ("SmolVLMForConditionalGeneration",)


def _shown(pixels: Tensor) -> Tensor:
    """Return which tiles of pixels [B, T, 3, H, W] are none of padding: BoolTensor [B, T]."""
    return (pixels != 0).flatten(2).any(dim=2)


def _groups(model: Any) -> Tensor:
    """Return the patches that every token of a tile joins: LongTensor [N, G]."""
    vision, connector = model.config.vision_config, model.model.connector
    numbers = torch.arange((vision.image_size // vision.patch_size) ** 2).view(1, -1, 1)
    shuffled: Tensor = connector.pixel_shuffle(numbers, connector.scale_factor)
    return shuffled[0]


def _refuse_padding(mask: Tensor | None, needs: Collection[str]) -> None:
    """Refuse readings inside the tower where a tile is partly padding, which blocks leave out."""
    names = [name for name in ENCODER_EXTRAS if name in needs]
    if not names or mask is None:
        return
    shown = mask.flatten(2).bool()
    if bool((shown.any(dim=2) & ~shown.all(dim=2)).any()):
        raise PruningError(
            f"the pruning method reads {names[0]!r} inside the tower, which is not done for images "
            "with padding (pixel_attention_mask); keep do_image_splitting on, or use another method"
        )
