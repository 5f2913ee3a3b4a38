"""Pictures of what was kept."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def overlay(
    image: Image.Image,
    kept: Tensor,
    grid: tuple[int, int],
    *,
    pad: bool = True,
    dim: float = 0.25,
) -> Image.Image:
    """The image with kept patches as they are and everything else dimmed; same size, RGB.

    Args:
        image: the picture the model was shown.
        kept: LongTensor [k], kept patches in raster order of the grid; -1 padding is ignored.
        grid: (rows, cols) of patches.
        pad: how the image became a square. True: centred in a square of its longer side
            (`image_aspect_ratio="pad"`); False: centre crop of its shorter side, in which case what
            lies outside the crop was never seen and is dimmed.
        dim: brightness of dropped patches, 0 is black.

    Raises IndexError for an index outside the grid.
    """
    image = image.convert("RGB")
    rows, cols = grid
    lit = torch.zeros(rows * cols, dtype=torch.uint8)
    lit[kept[kept >= 0].cpu()] = 255
    patches = Image.frombytes("L", (cols, rows), bytes(lit.tolist()))
    width, height = image.size
    side = max(width, height) if pad else min(width, height)
    # The square lies centred on the image, or the image centred on the square.
    left, top = (width - side) // 2, (height - side) // 2
    mask = Image.new("L", image.size, 0)
    mask.paste(patches.resize((side, side), Image.Resampling.NEAREST), (left, top))
    dimmed = image.point(lambda value: value * dim)
    return Image.composite(image, dimmed, mask)
