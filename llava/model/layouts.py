"""From the size of an image to the layout of its tiles: canvas, padding, order, newlines."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llava.anyres import (
    SPATIAL_PROTOCOLS,
    Size,
    canvas_choices,
    canvas_rule,
    fit_size,
    next_protocol,
    select_best_resolution,
    unpad_window,
)
from llava.pruning.layout import Box, ImageLayout
from llava.utils import UserInputError

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


class TileGeometry(NamedTuple):
    """What a model's settings say about tiles.

    Attributes:
        grid: (rows, columns) of patches in a tile.
        side: of a tile, in pixels.
        aspect: `image_aspect_ratio`.
        merge: `mm_patch_merge_type`; the protocols `fixed2880`, `spatial` and
            `spatial-filled` neither unpad nor have newlines.
        canvases: (width, height) of the canvases that crops are cut from; none without anyres.
        crops_centre: whether the tower's own preprocessing cuts the longer side of an image off.
        choose: which of the canvases an image of a size gets.
    """

    grid: tuple[int, int]
    side: int
    aspect: str | None
    merge: str
    canvases: tuple[Size, ...]
    crops_centre: bool = True
    choose: Callable[[Size, Sequence[Size]], Size] = select_best_resolution

    @classmethod
    def of(
        cls, config: Any, grid: tuple[int, int], side: int, crops_centre: bool = True
    ) -> "TileGeometry":
        """Read a model's config.

        Raises:
            UserInputError: values that no LLaVA-1.5 or 1.6 has.
        """
        merge = getattr(config, "mm_patch_merge_type", None) or "flat"
        if merge not in MERGE_TYPES:
            raise UserInputError(
                f"mm_patch_merge_type is {merge!r}; use one of {', '.join(MERGE_TYPES)}"
            )
        if next_protocol(config) in ("fixed2880", *SPATIAL_PROTOCOLS):
            merge = merge.removesuffix("_unpad")
        aspect = getattr(config, "image_aspect_ratio", None)
        canvases = canvas_choices(config, side) if aspect == "anyres" else ()
        choose = canvas_rule(config)
        return cls(grid, side, aspect, merge, tuple(canvases), crops_centre, choose)

    def layout(self, tiles: int, size: Size | None, stacked: bool) -> ImageLayout:
        """Make the layout of one image.

        Args:
            tiles: how many tiles the image was given as.
            size: its original (width, height), if known.
            stacked: whether images were given as stacks of tiles. A plain batch [B, 3, H, W] is
                one tile an image, and as in LLaVA the merge type then does not matter.

        Raises:
            UserInputError: crops that have to be arranged without the size of the image, or
                another number of them than the image's canvas has.
        """
        base = self.base_box(size)
        own = None if size is None else (size[0], size[1])
        if tiles == 1:
            newline = stacked and self.merge == "spatial_unpad"
            return ImageLayout(self.grid, newline=newline, base_box=base, size=own)
        if self.merge == "flat" and (size is None or not self.canvases):
            return ImageLayout(self.grid, crops=(1, tiles - 1), joined=False, size=own)
        if size is None or not self.canvases:
            raise UserInputError(
                f"mm_patch_merge_type {self.merge!r} arranges tiles by the size of the image: it "
                "needs image_aspect_ratio 'anyres', and image_sizes=[(width, height), ...] with "
                "one entry for each image"
            )
        canvas = self.choose(size, self.canvases)
        crops = canvas[1] // self.side, canvas[0] // self.side
        if tiles != 1 + crops[0] * crops[1]:
            raise UserInputError(
                f"an image of {size[0]} x {size[1]} pixels has 1 + {crops[0]} x {crops[1]} tiles, "
                f"but {tiles} were given; prepare images with process_images, and give their "
                "original (width, height) as image_sizes"
            )
        window = None
        if self.merge == "spatial_unpad":
            window = unpad_window(crops[0] * self.grid[0], crops[1] * self.grid[1], size)
        return ImageLayout(
            self.grid,
            crops=crops,
            window=window,
            joined=self.merge != "flat",
            newline=self.merge == "spatial_unpad",
            base_box=base,
            canvas_box=canvas_box(size, canvas),
            size=own,
        )

    def base_box(self, size: Size | None) -> Box | None:
        """Return the part of the image that its base view, or its only tile, shows."""
        # Tokens that form no square (the class token is among them) have no place in the image.
        if size is None or self.grid[0] != self.grid[1]:
            return None
        width, height = size
        if self.aspect == "anyres" or (self.aspect != "pad" and not self.crops_centre):
            return 0.0, 0.0, float(width), float(height)
        if self.aspect == "pad":
            side = max(size)
            left, top = -((side - width) // 2), -((side - height) // 2)
            return float(left), float(top), float(left + side), float(top + side)
        # CLIP's own preprocessing: the shorter side becomes `side`, then the centre is cut out.
        short = min(size)
        scaled = [self.side if s == short else int(self.side * s / short) for s in size]
        x, y = (
            (s - self.side) // 2 * original / s for s, original in zip(scaled, size, strict=True)
        )
        return x, y, x + self.side * width / scaled[0], y + self.side * height / scaled[1]


def canvas_box(size: Size, canvas: Size) -> Box:
    """Return the canvas in pixels of the image that was fitted into its centre."""
    fitted = fit_size(size, canvas)
    sides = []
    for original, inner, outer in zip(size, fitted, canvas, strict=True):
        scale = original / inner
        start = -((outer - inner) // 2)
        sides.append((start * scale, (start + outer) * scale))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def tile_grid(tower: Any, tokens: int) -> tuple[int, int]:
    """Return (rows, columns) of the `tokens` that `tower` makes of a tile."""
    side = tower.num_patches_per_side
    # With the class token among them, the tokens of a tile form no square.
    return (side, side) if tokens == side * side else (1, tokens)


def blank_patches(
    aspect: str | None,
    grid: tuple[int, int],
    tiles: Sequence[int],
    sizes: Sequence[Size] | None,
) -> torch.Tensor | None:
    """Return BoolTensor [T, N] over all tiles, True where only the padding of a square is seen.

    Only `image_aspect_ratio="pad"` (LLaVA-1.5) pads to squares that are read whole.

    Args:
        aspect: `image_aspect_ratio`.
        grid: (rows, columns) of patches in a tile.
        tiles: tiles of every image.
        sizes: original (width, height) of every image; None where they are unknown.

    Returns:
        None where it cannot be told: sizes are unknown, or tokens form no square.
    """
    rows, cols = grid
    blank = torch.zeros(sum(tiles), rows, cols, dtype=torch.bool)
    if aspect == "pad":
        if sizes is None or rows != cols:
            return None
        first = 0
        for count, (width, height) in zip(tiles, sizes, strict=True):
            side = max(width, height)
            blank[first] |= _outside(rows, side, height)[:, None]
            blank[first] |= _outside(cols, side, width)
            first += count
    return blank.flatten(1)


def _outside(cells: int, side: int, length: int) -> torch.Tensor:
    """Mark in BoolTensor [cells] equal parts of `side` with none of the `length` in its centre.

    An odd rest is halved, as MMTok's released code does, though the image is a whole pixel off.
    """
    start, end = torch.arange(cells) * 2 * side, torch.arange(1, cells + 1) * 2 * side
    return (end <= (side - length) * cells) | (start >= (side + length) * cells)


def padding_mask(layouts: Sequence[ImageLayout]) -> torch.Tensor | None:
    """Return BoolTensor [T, N] over all tiles, False for padding; None without any padding."""
    if all(size == layout.patches for layout in layouts for size in layout.tile_sizes):
        return None
    masks = []
    for layout in layouts:
        mask = torch.zeros(layout.tiles * layout.patches, dtype=torch.bool)
        mask[layout.sequence[layout.sequence >= 0]] = True
        masks.append(mask.view(layout.tiles, layout.patches))
    return torch.cat(masks)
