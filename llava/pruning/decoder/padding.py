"""Which visual tokens show the padding around an image, by the rules of PoRe's released masks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from llava.anyres import unpad_window
from llava.pruning.decoder.columns import PlacedImage
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE, Box, ImageLayout

# Rule -> the largest share of padding that a patch of the image may have; None for other rules.
RULES: dict[str, float | None] = {"half": 0.5, "percent": 0.01, "bilinear": None, "cells": None}


def shown_tokens(image: PlacedImage, rule: str) -> Tensor:
    """Return BoolTensor [total] on the CPU, False for tokens of the image that are padding.

    Rules: `half` and `percent`: more than half, or one per cent, of a patch's area is padding.
    `bilinear`: the mask of the image's pixels, read bilinearly at the patch's centre, is below 0.5.
    `cells`: the patch is none of the whole rows or columns that un-padding leaves. Newlines are no
    padding. Areas halve an odd rest of padding; the bilinear mask has it as LLaVA pads.

    Args:
        image: of the prompt.
        rule: one of RULES.

    Raises:
        PruningError: the size of the image is not known.
    """
    layout = image.layout
    if layout is None or not _is_located(layout) or len(layout.sequence) != image.total:
        raise PruningError(
            "which tokens are padding follows from the size of the picture, which is not known "
            "here; give image_sizes=[(width, height), ...], or the option padding='none'"
        )
    return _shown(layout, rule)


def _is_located(layout: ImageLayout) -> bool:
    """Return whether it is known what of the image every tile shows."""
    boxes = [layout.base_box, *[layout.canvas_box] * (layout.tiles > 1)]
    return layout.size is not None and None not in boxes


@lru_cache(maxsize=256)
def _shown(layout: ImageLayout, rule: str) -> Tensor:
    with torch.inference_mode(False):
        parts = [_shown_cells(layout, layout.base_box, layout.grid, rule).flatten()]
        if layout.tiles > 1:
            (down, across), (rows, cols) = layout.crops, layout.grid
            shape = down * rows, across * cols
            canvas = _shown_cells(layout, layout.canvas_box, shape, rule)
            tiles = canvas.view(down, rows, across, cols).transpose(1, 2)
            parts.append(tiles.flatten())
        sequence = layout.sequence
        return torch.cat(parts)[sequence.clamp(min=0)] | (sequence == NEWLINE)


def _shown_cells(layout: ImageLayout, box: Box | None, shape: tuple[int, int], rule: str) -> Tensor:
    """Return BoolTensor of `shape`: the cells of a box that are not padding."""
    assert box is not None and layout.size is not None
    left, top, right, bottom = box
    width, height = layout.size
    outer = max(bottom - top, height), max(right - left, width)
    if rule == "cells":
        return _unpadded_cells(shape, outer, (width, height))
    rows = _shown_along(shape[0], outer[0], height, rule)
    cols = _shown_along(shape[1], outer[1], width, rule)
    if (limit := RULES[rule]) is None:
        return (rows[:, None] * cols) >= 0.5
    return 1 - rows[:, None] * cols <= limit


def _shown_along(cells: int, side: float, length: int, rule: str) -> Tensor:
    """Return float64 [cells]: the shares of equal parts of `side` with the image in its centre."""
    if rule == "bilinear":
        pixels = round(side)
        start = (pixels - length) // 2
        mask = torch.zeros(1, 1, pixels, dtype=torch.float64)
        mask[..., start : start + length] = 1
        return interpolate(mask, size=cells, mode="linear", align_corners=False)[0, 0]
    # In units in which edges of cells and image are whole numbers where `side` is one.
    begin = torch.arange(cells, dtype=torch.float64) * 2 * side
    first, last = (side - length) * cells, (side + length) * cells
    covered = (begin + 2 * side).clamp(max=last) - begin.clamp(min=first)
    return covered.clamp(min=0) / (2 * side)


def _unpadded_cells(
    shape: tuple[int, int], outer: tuple[float, float], size: tuple[int, int]
) -> Tensor:
    cells = torch.zeros(shape, dtype=torch.bool)
    top, left, rows, cols = 0, 0, *shape
    if outer[0] > size[1] or outer[1] > size[0]:
        top, left, rows, cols = unpad_window(*shape, size)
    cells[top : top + rows, left : left + cols] = True
    return cells
