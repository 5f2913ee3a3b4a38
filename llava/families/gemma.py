"""Gemma 3 and PaliGemma: a SigLIP tower, one square tile an image, attention in both directions
within images.

Their prompts say in `token_type_ids` which tokens see each other in both directions; these are
shortened with the prompt, so the tokens that are left of an image still do. Sliding windows count
the tokens that are left, also with original positions, because masks are made by columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.families.family import Family, register
from llava.families.towers import EncoderReadings, digests, pool_readings, square_tiles
from llava.pruning.importance.offloaded import at_hand
from llava.pruning.tokens import VisualTokens


class SiglipFamily(Family):
    """One tile an image, read after the last norm of the tower."""

    unasked: ClassVar[str | None] = "come with token_type_ids"

    def projector(self, model: Any) -> nn.Module:
        module: nn.Module = model.model.multi_modal_projector
        return module

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = model.model.vision_tower.encoder.layers
        return layers

    def groups(self, model: Any) -> Tensor:
        """Return the patches that every token joins: LongTensor [N, G]."""
        vision = model.config.vision_config
        return torch.arange((vision.image_size // vision.patch_size) ** 2)[:, None]

    def joined(self, patches: Tensor, groups: Tensor) -> Tensor:
        """Return what the projector makes tokens of, [T, N, C'], from patches [T, P, C]."""
        return patches

    def inner_projector(self, model: Any) -> nn.Module:
        """Return the part of the projector that maps what is joined to tokens."""
        return self.projector(model)

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [len(self.groups(model))] * len(inputs["pixel_values"])

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens:
        layers, groups = self.blocks(model), self.groups(model)
        readings = EncoderReadings(layers, len(layers), 0, needs)
        _, patches, projected = self.run_vision(model, inputs, readings.capture())
        count = len(projected)
        found = pool_readings(readings.extras(count), groups)
        return square_tiles(
            [1] * count,
            round(len(groups) ** 0.5),
            self.joined(patches, groups),
            projected,
            projector=self.inner_projector(model),
            extras={**found, **digests(inputs["pixel_values"], needs)},
            class_token=False,
        )

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        # Some vocabularies end before the placeholder, whose embedding nobody reads.
        marks = torch.tensor(self.placeholders(model), device=ids.device)
        return super().embed(model, ids.masked_fill(torch.isin(ids, marks), 0))


@register
class PaliGemma(SiglipFamily):
    """`google/paligemma-*` and `paligemma2-*`.

    Their positions begin with 1 and those of pruned prompts with 0, which is the same to a language
    model that reads differences of positions (RoPE).
    """

    name: ClassVar[str] = "paligemma"
    classes: ClassVar[tuple[str, ...]] = ("PaliGemmaForConditionalGeneration",)


@register
class Gemma3(SiglipFamily):
    """`google/gemma-3-*`: a token is the mean of a square of patches; crops count as images."""

    name: ClassVar[str] = "gemma3"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration",)

    def groups(self, model: Any) -> Tensor:
        side = model.model.multi_modal_projector.patches_per_image
        edge = model.model.multi_modal_projector.kernel_size
        numbers = torch.arange(side * side).view(side // edge, edge, side // edge, edge)
        return numbers.transpose(1, 2).flatten(2).flatten(0, 1)

    def joined(self, patches: Tensor, groups: Tensor) -> Tensor:
        return patches[:, groups.to(patches.device)].mean(dim=2)

    def inner_projector(self, model: Any) -> nn.Module:
        return NormedMatrix(model.model.multi_modal_projector)


class NormedMatrix(nn.Module):
    """What Gemma 3's projector does with means of patches.

    Args:
        projector: a `Gemma3MultiModalProjector`.
    """

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, means: Tensor) -> Tensor:
        """Map means of patches [..., C] to tokens [..., D]."""
        # Its weights are read here and not by its own `forward`, which would load them.
        own: Any = at_hand(self.projector, means.device)
        tokens: Tensor = own.mm_soft_emb_norm(means) @ own.mm_input_projection_weight
        return tokens.type_as(means)
