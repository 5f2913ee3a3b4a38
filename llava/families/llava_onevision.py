"""LLaVA-OneVision: a SigLIP tower, many crops, canvases that are made smaller where they are large.

Frames of videos are images with a quarter of the tokens, made by interpolation too; the last one of
a video ends in its newline.

A canvas of more than `anyres_max_9` tiles is interpolated after the projector, so a token of it is
a mix of projections. Its features are mixed with the same weights: features and token belong to
the same point of the image, and `projector(features)` is close to the token without being it, as in
the model itself. The tokens are the model's own, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from llava.families.family import misfit, outline_of, register
from llava.families.llava import LlavaNext, check_tiles, has_class_token, tower_readings
from llava.families.prompts import ImageColumns, find_images
from llava.families.towers import digests, no_padding
from llava.model.layouts import blank_patches, canvas_box, padding_mask
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE, ImageLayout
from llava.pruning.ragged import Place, RaggedTokens
from llava.pruning.tokens import TILE_EXTRAS, VisualTokens


class Canvas(NamedTuple):
    """An image as its tower sees it and as its language model reads it.

    Attributes:
        cut: its tiles as they are cut out.
        read: tiles of the same size that the canvas has after interpolation; `cut` without any.
        size: (width, height) of the image in pixels.
    """

    cut: ImageLayout
    read: ImageLayout
    size: tuple[int, int]

    @property
    def blank(self) -> Tensor:
        """BoolTensor [tiles, N], see `VisualTokens.blank`: only single tiles are padded squares."""
        aspect = "pad" if self.read.crops == (0, 0) else None
        blank = blank_patches(aspect, self.read.grid, [self.read.tiles], [self.size])
        assert blank is not None  # the size is known
        return blank


@register
class LlavaOnevision(LlavaNext):
    """`llava-hf/llava-onevision-*`; images of prompts with several are one tile each."""

    squares: ClassVar[bool] = True
    name: ClassVar[str] = "llava_onevision"
    classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionForConditionalGeneration",)
    pixels: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "batch_num_images",
        "pixel_values_videos",
        "image_sizes_videos",
    )
    shown: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    lone_images: ClassVar[str | None] = "it cuts images of such prompts into other tiles"

    def placeholders(self, model: Any) -> list[int]:
        return [model.config.image_token_id, model.config.video_token_id]

    def find(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor
    ) -> list[ImageColumns]:
        image, video = self.placeholders(model)
        found: list[ImageColumns] = []
        if inputs.get("pixel_values") is not None:
            found += find_images(ids, mask, [image], self.lengths(model, inputs, ids))
        if inputs.get("pixel_values_videos") is not None:
            frames = [len(layout.sequence) for layout in self.frames(model, inputs)]
            found += find_images(ids, mask, [video], frames)
        return found

    def outline(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor
    ) -> VisualTokens | RaggedTokens:
        if inputs.get("pixel_values_videos") is None:
            return super().outline(model, inputs, ids)
        found = self.find(model, inputs, ids, torch.ones_like(ids, dtype=torch.bool))
        return outline_of([len(image.columns) for image in found])

    def canvases(self, model: Any, inputs: Mapping[str, Any]) -> list[Canvas]:
        """Return how the tiles of every image of a call lie.

        Raises:
            PruningError: the sizes of the images are missing, or the tower has a class token.
        """
        if inputs["image_sizes"] is None:
            raise PruningError(
                "LLaVA-OneVision needs image_sizes beside pixel_values, see its processor"
            )
        if has_class_token(model):
            raise PruningError("LLaVA-OneVision is pruned with towers without a class token")
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        rows = inputs.get("batch_num_images")
        numbers = [1] * len(sizes) if rows is None else torch.as_tensor(rows).tolist()
        if sum(numbers) != len(sizes):
            raise misfit(
                f"batch_num_images counts {sum(numbers)} images", f"image_sizes has {len(sizes)}"
            )
        alone = [number == 1 for number in numbers for _ in range(number)]
        return [
            self._canvas(model, (height, width)) if cut else self._tile(model, (height, width))
            for (height, width), cut in zip(sizes, alone, strict=True)
        ]

    def layouts(self, model: Any, inputs: Mapping[str, Any]) -> tuple[ImageLayout, ...]:
        canvases = self.canvases(model, inputs)
        check_tiles(inputs["pixel_values"], [canvas.cut for canvas in canvases])
        return tuple(canvas.read for canvas in canvases)

    def located(self, model: Any, layout: ImageLayout, size: tuple[int, int]) -> ImageLayout:
        """Return the layout as it is: it knows the size of its image already."""
        return layout

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens | RaggedTokens:
        visual = []
        if inputs.get("pixel_values") is not None:
            visual.append(self._encode_images(model, inputs, needs))
        if inputs.get("pixel_values_videos") is not None:
            visual.append(self._encode_frames(model, inputs, needs))
        if len(visual) == 1:
            return visual[0]
        places = [
            Place(group, image)
            for group, tokens in enumerate(visual)
            for image in range(tokens.num_images)
        ]
        return RaggedTokens(tuple(visual), tuple(places))

    def _encode_images(
        self, model: Any, inputs: Mapping[str, Any], needs: Collection[str]
    ) -> VisualTokens:
        canvases = self.canvases(model, inputs)
        cut = tuple(canvas.cut for canvas in canvases)
        output, visual = self.encode_tiles(model, inputs, cut, needs)
        if any(canvas.read is not canvas.cut for canvas in canvases):
            visual = _interpolated(visual, canvases, output.pooler_output)
        blank = torch.cat([canvas.blank for canvas in canvases])
        return replace(visual, blank=blank.to(visual.projected.device))

    def frames(self, model: Any, inputs: Mapping[str, Any]) -> tuple[ImageLayout, ...]:
        """Return the layouts of all frames of the videos of a call."""
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        frame = ImageLayout(_half(self.tile_grid(model)))
        return (*[frame] * (frames - 1), replace(frame, newline=True)) * videos

    def _encode_frames(
        self, model: Any, inputs: Mapping[str, Any], needs: Collection[str]
    ) -> VisualTokens:
        layouts, pixels = self.frames(model, inputs), inputs["pixel_values_videos"]
        grid, half = self.tile_grid(model), layouts[0].grid
        readings = tower_readings(model, needs)
        function = partial(model.model.get_video_features, pixels, return_dict=True)
        output, features, _ = self.run_captured(model, function, readings.capture())
        read = readings.extras(len(layouts))
        # Some releases put the newline of a video behind its frames here, others later.
        each = pixels.shape[1] * half[0] * half[1]
        projected = output.pooler_output[:, :each].flatten(0, 1).unflatten(0, (len(layouts), -1))
        return VisualTokens(
            features=_resized(features.unflatten(1, grid), half),
            projected=projected,
            projector=self.projector(model),
            image_index=torch.arange(len(layouts)),
            grid=half,
            extras={
                **{
                    name: list(_resized(torch.stack(tiles).unflatten(1, grid), half))
                    for name, tiles in read.items()
                },
                **digests(pixels.flatten(0, 1), needs),
            },
            class_token=False,
            blank=no_padding(projected),
            layouts=layouts,
            newline=self.newline(model),
        )

    def _tile(self, model: Any, size: tuple[int, int]) -> Canvas:
        """Return the only tile of an image of (height, width) pixels, padded to a square."""
        side, (height, width) = max(size), size
        left, top = -((side - width) // 2), -((side - height) // 2)
        box = (float(left), float(top), float(left + side), float(top + side))
        layout = ImageLayout(self.tile_grid(model), newline=True, base_box=box)
        return Canvas(layout, layout, (width, height))

    def _canvas(self, model: Any, size: tuple[int, int]) -> Canvas:
        """Return the base view and the crops of an image of (height, width) pixels."""
        side, (height, width) = model.config.vision_config.image_size, size
        cut = self._layout(model, size)
        grid, crops = cut.grid, cut.crops
        cut = replace(
            cut,
            base_box=(0.0, 0.0, float(width), float(height)),
            canvas_box=canvas_box((width, height), (crops[1] * side, crops[0] * side)),
        )
        top, left, rows, columns = _window(cut)
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * grid[0] ** 2))
        if ratio <= 1.1:
            return Canvas(cut, cut, (width, height))
        shape = int(rows // ratio), int(columns // ratio)
        tiles = math.ceil(shape[0] / grid[0]), math.ceil(shape[1] / grid[1])
        assert cut.canvas_box is not None
        x, y, right, bottom = cut.canvas_box
        # Cells of the canvas before and after interpolation.
        across, down = (right - x) / (crops[1] * grid[1]), (bottom - y) / (crops[0] * grid[0])
        x, y = x + left * across, y + top * down
        across, down = across * columns / shape[1], down * rows / shape[0]
        box = x, y, x + tiles[1] * grid[1] * across, y + tiles[0] * grid[0] * down
        read = replace(cut, crops=tiles, window=(0, 0, *shape), canvas_box=box)
        return Canvas(cut, read, (width, height))


def _window(layout: ImageLayout) -> tuple[int, int, int, int]:
    assert layout.window is not None  # `LlavaNext` always has one
    return layout.window


def _interpolated(
    visual: VisualTokens, canvases: Sequence[Canvas], packed: Sequence[Tensor]
) -> VisualTokens:
    """Return the tokens of canvases as they are read.

    Args:
        visual: the tokens of all tiles as they were cut.
        canvases: the layouts of every image.
        packed: what the model reads of every image, [n, D] with newlines.
    """
    layouts = tuple(canvas.read for canvas in canvases)
    owned = [visual.tiles_of(image) for image in range(len(canvases))]
    parts = [slice(tiles[0], tiles[-1] + 1) for tiles in owned]
    plan = list(zip(canvases, parts, strict=True))
    extras = dict(visual.extras)
    for name in [key for key in extras if key in TILE_EXTRAS]:
        change: Callable[..., Any] = _mixed_digests if name == "image_digest" else _mixed_values
        tiles = extras[name]
        extras[name] = [value for canvas, own in plan for value in change(canvas, tiles[own])]
    whole = visual.features
    features = [tile for canvas, own in plan for tile in _mixed_values(canvas, whole[own])]
    projected = [
        _on_tiles(canvas.read, tokens[canvas.read.sequence != NEWLINE])
        for canvas, tokens in zip(canvases, packed, strict=True)
    ]
    valid = padding_mask(layouts)
    counts = torch.tensor([layout.tiles for layout in layouts])
    return replace(
        visual,
        features=torch.stack(features),
        projected=torch.cat(projected).to(visual.projected.device),
        image_index=torch.arange(len(layouts)).repeat_interleave(counts),
        valid=None if valid is None else valid.to(visual.projected.device),
        blank=None,
        extras=extras,
        layouts=layouts,
    )


def _mixed_values(canvas: Canvas, tiles: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Interpolate values [N, ...] of every tile of an image over its canvas."""
    values = torch.stack(list(tiles))
    if canvas.read is canvas.cut:
        return list(values)
    rows, columns = _window(canvas.cut)[2:]
    lines = canvas.cut.sequence[canvas.cut.patches :].view(rows, columns + 1)[:, :-1]
    places = values.flatten(0, 1)[lines.to(values.device)]
    tokens = _resized(places[None], _window(canvas.read)[2:])[0]
    return list(_on_tiles(canvas.read, torch.cat([values[0], tokens])))


def _half(grid: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _resized(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Interpolate values [T, rows, columns, ...] as the model does its tokens: [T, n, ...]."""
    channels = values.flatten(3) if values.ndim > 3 else values[..., None]
    resized = interpolate(channels.permute(0, 3, 1, 2), list(shape), mode="bilinear")
    return resized.flatten(2).transpose(1, 2).reshape(len(values), -1, *values.shape[3:])


def _on_tiles(layout: ImageLayout, tokens: Tensor) -> Tensor:
    """Lay the tokens [n, ...] of an image, in reading order without newlines, on its tiles."""
    places = layout.sequence[layout.sequence != NEWLINE].to(tokens.device)
    tiles = tokens.new_zeros(layout.tiles * layout.patches, *tokens.shape[1:])
    return tiles.index_copy(0, places, tokens).unflatten(0, (layout.tiles, layout.patches))


def _mixed_digests(canvas: Canvas, tiles: Sequence[int]) -> list[int]:
    """Return a number for every tile that is read: it depends on all crops."""
    if canvas.read is canvas.cut:
        return list(tiles)
    crops = "/".join(map(str, tiles[1:]))
    names = (f"{crops}:{tile}".encode() for tile in range(1, canvas.read.tiles))
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    return [tiles[0], *(int.from_bytes(digest, "big") for digest in digests)]
