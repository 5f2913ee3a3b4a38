"""Draw which parts of an image were kept."""

import math
from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from llava.pruning.layout import Box, ImageLayout, box_of_cell
from llava.pruning.tokens import ImageTokens

# (left, top, right, bottom) in whole pixels of the image, right and bottom excluded.
Pixels = tuple[int, int, int, int]


def covered_pixels(box: Box, size: tuple[int, int]) -> Pixels:
    """Find the pixels of an image of (width, height) whose centres are in `box`; perhaps none.

    Neighbouring boxes share no pixel, and no pixel between them is left out.
    """
    left, top, right, bottom = box
    width, height = size

    def inside(edge: float, most: int) -> int:
        return min(max(math.ceil(edge - 0.5), 0), most)

    return inside(left, width), inside(top, height), inside(right, width), inside(bottom, height)


def kept_pixels(
    visual: ImageTokens, image: int, size: tuple[int, int], layout: ImageLayout | None = None
) -> list[Pixels | None]:
    """Find, for every token that is left of `image`, the pixels of the original picture it shows.

    None for a newline. Tokens of padding and of the rim of a padded image may show none (an empty
    rectangle). Base view and crops of one image show the same pixels at two scales.

    Raises:
        PruningError: the encoder was not told the image's size, or tokens were merged.
    """
    boxes = visual.boxes(image, layout)
    return [None if box is None else covered_pixels(box, size) for box in boxes]


def overlay_tokens(
    image: Image.Image,
    visual: ImageTokens,
    index: int = 0,
    *,
    dim: float = 0.25,
    layout: ImageLayout | None = None,
) -> Image.Image:
    """Dim everything that the kept tokens of image `index` do not show.

    Args:
        image: the picture that was encoded, at its original size.
        visual: its tokens, pruned or not.
        index: its number.
        layout: see `ImageTokens.boxes`.
        dim: brightness of dropped pixels, 0 is black.

    Returns:
        An RGB image of the same size.

    Raises:
        PruningError: see `kept_pixels`.
    """
    shown = kept_pixels(visual, index, image.size, layout)
    return _dim_others(image, (pixels for pixels in shown if pixels is not None), dim)


def overlay(
    image: Image.Image,
    kept: Tensor,
    grid: tuple[int, int],
    *,
    pad: bool = True,
    dim: float = 0.25,
) -> Image.Image:
    """Do as `overlay_tokens`, for one tile and without ImageTokens.

    Args:
        image: the picture the model was shown.
        kept: LongTensor [k], kept patches in raster order of the grid; -1 padding is ignored.
        grid: (rows, cols) of patches.
        pad: how the image became a square. True: centred in a square of its longer side
            (`image_aspect_ratio="pad"`); False: centre crop of its shorter side, in which case what
            lies outside the crop was never seen and is dimmed.
        dim: brightness of dropped patches, 0 is black.

    Raises:
        IndexError: an index is outside the grid.
    """
    rows, cols = grid
    width, height = image.size
    side = max(width, height) if pad else min(width, height)
    left, top = -((side - width) // 2), -((side - height) // 2)
    square, shown = (left, top, left + side, top + side), []
    for index in kept[kept >= 0].tolist():
        if index >= rows * cols:
            raise IndexError(f"patch {index} lies outside the grid {grid}")
        box = box_of_cell(square, grid, *divmod(index, cols))
        shown.append(covered_pixels(box, image.size))
    return _dim_others(image, shown, dim)


def _dim_others(image: Image.Image, shown: Iterable[Pixels], dim: float) -> Image.Image:
    image = image.convert("RGB")
    width, height = image.size
    lit = torch.zeros(height, width, dtype=torch.uint8)
    for left, top, right, bottom in shown:
        lit[top:bottom, left:right] = 255
    mask = Image.frombytes("L", image.size, lit.numpy().tobytes())
    return Image.composite(image, image.point(lambda value: value * dim), mask)
