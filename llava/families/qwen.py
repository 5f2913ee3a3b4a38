"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any shape, 2 x 2 patches joined, M-RoPE."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from llava.families.family import Encoded, Family, register
from llava.families.packed import PackedReadings
from llava.families.towers import digests
from llava.pruning.errors import PruningError
from llava.pruning.importance.projectors import JoinedMerger
from llava.pruning.layout import ImageLayout
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens


class QwenFamily(Family):
    """What all of them have in common; a class says how its tower orders tokens."""

    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def projector(self, model: Any) -> nn.Module:
        merger: nn.Module = model.model.visual.merger
        return merger

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = model.model.visual.blocks
        return blocks

    def grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return (rows, columns) of the tokens of every image.

        Raises:
            PruningError: the grids are missing.
        """
        grids = inputs["image_grid_thw"]
        if grids is None:
            raise PruningError("Qwen-VL models need image_grid_thw beside pixel_values")
        side = model.model.visual.spatial_merge_size
        return [(rows // side, columns // side) for _, rows, columns in grids.tolist()]

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [rows * columns for rows, columns in self.grids(model, inputs)]

    def order(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return where the tower has each token, LongTensor [n]; None for raster order."""
        return None

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> Encoded:
        joined = model.model.visual.spatial_merge_size**2
        grids = self.grids(model, inputs)
        sizes = [rows * columns for rows, columns in grids]
        order = self.order(model, inputs)
        readings = PackedReadings(self.blocks(model), [n * joined for n in sizes], needs)
        output, patches, projected = self.run_vision(model, inputs, readings.capture())
        features = patches.reshape(len(projected), -1)
        if order is not None:
            at = order.to(features.device)
            features, projected = features[at], projected[at]
        found = readings.extras(joined, order)
        pixels = inputs["pixel_values"].split([n * joined for n in sizes])
        projector = JoinedMerger(self.projector(model), joined)
        parts = zip(features.split(sizes), projected.split(sizes), strict=True)
        images = [
            VisualTokens(
                features=own[None],
                projected=tokens[None],
                projector=projector,
                image_index=torch.zeros(1, dtype=torch.long),
                grid=grid,
                extras={
                    **{name: [values[number]] for name, values in found.items()},
                    **digests(pixels[number][None], needs),
                },
                class_token=False,
                layouts=(ImageLayout(grid),),
            )
            for number, ((own, tokens), grid) in enumerate(zip(parts, grids, strict=True))
        ]
        return Encoded(RaggedTokens.of(images), self.deep(output, sizes))

    def deep(self, output: Any, sizes: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
        """Return the deep features of a call, see `Encoded`."""
        return ()

    def positions(self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        grids = inputs["image_grid_thw"]
        kinds = torch.isin(ids, torch.tensor(self.placeholders(model))).int()
        positions: Tensor = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grids.cpu(), attention_mask=mask.long()
        )[0]
        return positions


@register
class Qwen2VL(QwenFamily):
    """`Qwen/Qwen2-VL-*`."""

    name: ClassVar[str] = "qwen2_vl"
    classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)


@register
class Qwen25VL(QwenFamily):
    """`Qwen/Qwen2.5-VL-*`: its tower goes through an image window by window."""

    name: ClassVar[str] = "qwen2_5_vl"
    classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLForConditionalGeneration",)

    def order(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        tower = model.model.visual
        windows, _ = get_vision_window_index(
            inputs["image_grid_thw"].cpu(),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return windows.argsort()


@register
class Qwen3VL(QwenFamily):
    """`Qwen/Qwen3-VL-*`: features of inner blocks of the tower go into inner layers (DeepStack)."""

    name: ClassVar[str] = "qwen3_vl"
    classes: ClassVar[tuple[str, ...]] = ("Qwen3VLForConditionalGeneration",)

    def deep(self, output: Any, sizes: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
        # One tensor a level in older releases, one for each image of a level in newer ones.
        levels = output.deepstack_features
        return tuple(
            tuple(level.split(list(sizes)) if isinstance(level, Tensor) else level)
            for level in levels
        )
