"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any shape, 2 x 2 patches joined, M-RoPE."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from llava.families.family import Family, misfit, register
from llava.families.packed import PackedReadings
from llava.families.prompts import ImageColumns, find_images
from llava.families.towers import digests, no_padding
from llava.pruning.errors import PruningError
from llava.pruning.importance.projectors import JoinedMerger
from llava.pruning.layout import ImageLayout
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens

_NOTHING = nn.Identity()


class _Source(NamedTuple):
    """Arguments that bring images or videos."""

    pixels: str
    grids: str
    moving: bool


_SOURCES = (
    _Source("pixel_values", "image_grid_thw", False),
    _Source("pixel_values_videos", "video_grid_thw", True),
)


class _View(NamedTuple):
    """An image, or a frame of the video of a number: (rows, columns) of its tokens."""

    number: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.grid[0] * self.grid[1]


def _views(model: Any, inputs: Mapping[str, Any], source: _Source) -> list[_View]:
    """Return the images of a call, or all frames of its videos.

    Raises:
        PruningError: their grids are missing, or are of other images.
    """
    if inputs.get(source.pixels) is None:
        return []
    if inputs.get(source.grids) is None:
        raise PruningError(f"{type(model).__name__} needs {source.grids} beside {source.pixels}")
    grids = inputs[source.grids].tolist()
    found, wanted = len(inputs[source.pixels]), sum(t * rows * cols for t, rows, cols in grids)
    if found != wanted:
        raise misfit(f"{source.grids} asks for {wanted} patches", f"{source.pixels} has {found}")
    side = model.model.visual.spatial_merge_size
    return [
        _View(number, (rows // side, columns // side))
        for number, (frames, rows, columns) in enumerate(grids)
        for _ in range(frames)
    ]


class QwenFamily(Family):
    """What all of them have in common; a class says how its tower orders tokens.

    A frame of a video (two pictures, which the tower takes together) is an image of its own, with
    its own budget; `scope="prompt"` makes the budget that of the whole prompt.
    """

    pixels: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    shown: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    axes: ClassVar[int] = 3
    # Whether the frames of a video share their rows and columns of positions.
    joint_videos: ClassVar[bool] = True

    def projector(self, model: Any) -> nn.Module:
        merger: nn.Module = model.model.visual.merger
        return merger

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = model.model.visual.blocks
        return blocks

    def placeholders(self, model: Any) -> list[int]:
        return [model.config.image_token_id, model.config.video_token_id]

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [view.tokens for source in _SOURCES for view in _views(model, inputs, source)]

    def outline(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> RaggedTokens:
        first = torch.zeros(1, dtype=torch.long)
        images = []
        for view in (view for source in _SOURCES for view in _views(model, inputs, source)):
            nothing, layouts = torch.zeros(1, view.tokens, 0), (ImageLayout(view.grid),)
            images.append(
                VisualTokens(nothing, nothing, _NOTHING, first, view.grid, layouts=layouts)
            )
        return RaggedTokens.of(images)

    def find(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor
    ) -> list[ImageColumns]:
        found: list[ImageColumns] = []
        for source, mark in zip(_SOURCES, self.placeholders(model), strict=True):
            views = _views(model, inputs, source)
            images = find_images(ids, mask, [mark], [view.tokens for view in views])
            for image, view in zip(images, views, strict=True):
                joint = source.moving and self.joint_videos
                found.append(image._replace(video=view.number if joint else None))
        return found

    def order(self, model: Any, grids: Tensor) -> Tensor | None:
        """Return where the tower has each token, LongTensor [n]; None for raster order."""
        return None

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> RaggedTokens:
        images: list[VisualTokens] = []
        deep: list[list[Tensor]] = []
        for source in _SOURCES:
            if inputs.get(source.pixels) is not None:
                found, levels = self._encode(model, inputs, source, needs)
                images += found
                deep = [[*a, *b] for a, b in zip(deep, levels, strict=True)] if deep else levels
        return replace(RaggedTokens.of(images), deep=tuple(map(tuple, deep)))

    def _encode(
        self, model: Any, inputs: Mapping[str, Any], source: _Source, needs: Collection[str]
    ) -> tuple[list[VisualTokens], list[list[Tensor]]]:
        """Encode all images, or all frames of videos: their tokens, and per level deep features."""
        joined = model.model.visual.spatial_merge_size**2
        views, grids = _views(model, inputs, source), inputs[source.grids]
        sizes = [view.tokens for view in views]
        readings = PackedReadings(self.blocks(model), [n * joined for n in sizes], needs)
        given = {"pixel_values": inputs[source.pixels], "image_grid_thw": grids}
        output, patches, projected = self.run_vision(model, given, readings.capture())
        features = patches.reshape(len(projected), -1)
        order = self.order(model, grids.cpu())
        if order is not None:
            at = order.to(features.device)
            features, projected = features[at], projected[at]
        found = readings.extras(joined, order)
        pixels = inputs[source.pixels].split([n * joined for n in sizes])
        projector = JoinedMerger(self.projector(model), joined)
        parts = zip(features.split(sizes), projected.split(sizes), strict=True)
        images = [
            VisualTokens(
                features=own[None],
                projected=tokens[None],
                projector=projector,
                image_index=torch.zeros(1, dtype=torch.long),
                grid=view.grid,
                extras={
                    **{name: [values[number]] for name, values in found.items()},
                    **digests(pixels[number][None], needs),
                },
                class_token=False,
                layouts=(ImageLayout(view.grid),),
                blank=no_padding(tokens[None]),
            )
            for number, ((own, tokens), view) in enumerate(zip(parts, views, strict=True))
        ]
        return images, [list(torch.cat([*level]).split(sizes)) for level in self.deep(output)]

    def deep(self, output: Any) -> list[Sequence[Tensor]]:
        """Return the deep features of a call: per level tensors [n, D], one after the other."""
        return []

    def geometry(self, model: Any, visual: Any) -> dict[str, Any]:
        side = model.model.visual.spatial_merge_size
        grids = [visual.layout_of(image).grid for image in range(visual.num_images)]
        return {
            "image_grid_thw": torch.tensor([[1, rows * side, cols * side] for rows, cols in grids])
        }

    def positions(self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        kinds = torch.zeros_like(ids)
        for kind, mark in enumerate(self.placeholders(model), start=1):
            kinds[ids == mark] = kind
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        given = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in given.items()}
        positions: Tensor = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds.int(), attention_mask=mask.long(), **given
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

    def order(self, model: Any, grids: Tensor) -> Tensor | None:
        tower = model.model.visual
        windows, _ = get_vision_window_index(
            grids,
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

    # The prompt gives the time of every frame in words, and frames stand apart.
    joint_videos: ClassVar[bool] = False

    def hands_over(self, model: Any) -> bool:
        return True

    def deep(self, output: Any) -> list[Sequence[Tensor]]:
        # One tensor a level in older releases, one for each image of a level in newer ones.
        return [
            [level] if isinstance(level, Tensor) else level for level in output.deepstack_features
        ]


@register
class Qwen35(QwenFamily):
    """`Qwen/Qwen3.5-*`: no DeepStack; most layers of the language model are linear attention."""

    name: ClassVar[str] = "qwen3_5"
    classes: ClassVar[tuple[str, ...]] = ("Qwen3_5ForConditionalGeneration",)

    # As in Qwen3-VL.
    joint_videos: ClassVar[bool] = False
