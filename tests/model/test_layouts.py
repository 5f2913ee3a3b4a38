"""Token counts of any image, the order of its tokens, and the pixels that each of them shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.anyres import SPATIAL_PROTOCOLS
from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
    unpad_image,
)
from llava.model.layouts import TileGeometry, padding_mask
from llava.pruning.layout import NEWLINE, ImageLayout
from llava.pruning.visualize import covered_pixels
from llava.utils import UserInputError

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
GRID, SIDE = (24, 24), 336


def _geometry(merge: str = "spatial_unpad", aspect: str | None = "anyres", **more) -> TileGeometry:
    config = SimpleNamespace(
        mm_patch_merge_type=merge, image_aspect_ratio=aspect, image_grid_pinpoints=PINPOINTS, **more
    )
    return TileGeometry.of(config, GRID, SIDE)


def _tiles(size: tuple[int, int]) -> int:
    across, down = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return 1 + across * down


def _layout(size: tuple[int, int], merge: str = "spatial_unpad") -> ImageLayout:
    return _geometry(merge).layout(_tiles(size), size, stacked=True)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        *(((336, 336), 1176), ((100, 100), 1176), ((640, 480), 2340), ((1024, 768), 2340)),
        *(((480, 640), 2352), ((640, 427), 2144), ((1920, 1080), 1948), ((1080, 1920), 1968)),
        *(((672, 672), 2928), ((448, 448), 2928), ((1000, 300), 2182), ((50, 1000), 936)),
        *(((1024, 899), 2634), ((1, 1000), 576 + 72), ((1000, 1), 576)),
    ],
)
def test_token_counts(size, count) -> None:
    assert len(_layout(size).sequence) == count


@given(SIZES)
@settings(max_examples=80, deadline=None)
def test_sequence_is_unpad_and_newline_of_the_map(size) -> None:
    """The tokens of any image, arranged as LLaVA arranges maps of features."""
    across, down = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    ids = torch.arange((1 + across * down) * 576)
    crops = ids[576:].view(down, across, 24, 24)
    canvas = torch.cat([torch.cat(list(row), dim=1) for row in crops], dim=0)[None]
    flat = _geometry("flat").layout(1 + across * down, size, stacked=True)
    assert torch.equal(flat.sequence, ids)
    spatial = _layout(size, "spatial")
    assert torch.equal(spatial.sequence, torch.cat([ids[:576], canvas.flatten()]))
    rows = unpad_image(canvas, size)[0]
    ended = torch.cat([rows, rows.new_full((len(rows), 1), NEWLINE)], dim=1)
    unpadded = _layout(size)
    assert torch.equal(unpadded.sequence, torch.cat([ids[:576], ended.flatten()]))
    assert sum(unpadded.tile_sizes) == 576 + rows.numel()
    assert len(unpadded.newline_grid(unpadded.sequence)) == len(rows)
    mask = padding_mask([unpadded])
    shown = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask.flatten()
    assert shown.sum() == 576 + rows.numel() and shown[rows].all()


def test_one_tile_and_plain_batches() -> None:
    assert len(_geometry().layout(1, None, stacked=True).sequence) == 577
    assert len(_geometry().layout(1, None, stacked=False).sequence) == 576
    assert len(_geometry("spatial").layout(1, None, stacked=True).sequence) == 576


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(640, 480), (50, 1000), (300, 300)])
def test_fixed2880(merge, size) -> None:
    layout = _geometry(merge, mm_next_protocol="fixed2880").layout(5, size, stacked=True)
    assert len(layout.sequence) == 2880 and not layout.newline
    order = layout.sequence.tolist()
    assert sorted(order) == list(range(2880)) and (order == sorted(order)) == (merge == "flat")


@pytest.mark.parametrize("size", [(640, 480), (50, 1000), (1009, 673)])
@pytest.mark.parametrize("protocol", SPATIAL_PROTOCOLS)
def test_spatial_reads_the_whole_canvas(protocol: str, size: tuple[int, int]) -> None:
    geometry = _geometry(mm_next_protocol=protocol)
    across, down = (side // SIDE for side in geometry.choose(size, PINPOINTS))
    layout = geometry.layout(1 + across * down, size, stacked=True)
    assert not layout.newline and layout.tile_sizes == (576,) * layout.tiles
    assert padding_mask([layout]) is None
    plain = _geometry("spatial").layout(_tiles(size), size, stacked=True)
    assert (layout == plain) == (protocol == "spatial" or size != (1009, 673))


@pytest.mark.parametrize(
    ("change", "tiles", "size", "message"),
    [
        ({}, 5, None, r"image_sizes=\[\(width, height\), ...\]"),
        ({"aspect": "pad"}, 5, (640, 480), "it needs image_aspect_ratio 'anyres'"),
        ({}, 4, (640, 480), r"640 x 480 pixels has 1 \+ 2 x 2 tiles, but 4 were given"),
        ({"merge": "pool"}, 5, (640, 480), "use one of flat, spatial, spatial_unpad"),
        ({"mm_next_protocol": "x"}, 5, (640, 480), "use one of native, fixed2880, zoo-release"),
        ({"aspect": "pad", "mm_next_protocol": "fixed2880"}, 1, (640, 480), "use 'native'"),
    ],
)
def test_refused(change, tiles, size, message) -> None:
    with pytest.raises(UserInputError, match=message):
        _geometry(**change).layout(tiles, size, stacked=True)


def _number(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """White inside the box of pixels, black elsewhere."""
    picture = Image.new("L", image.size, 0)
    picture.paste(255, box)
    return picture.convert("RGB")


def _views(picture: Image.Image, aspect: str | None) -> list[Image.Image]:
    """What the tower is shown, by the functions that prepare pixels."""
    if aspect == "anyres":
        canvas = select_best_resolution(picture.size, PINPOINTS)
        crops = divide_to_patches(resize_and_pad_image(picture, canvas), SIDE)
        return [picture.resize((SIDE, SIDE)), *crops]
    if aspect == "pad":
        return [expand2square(picture, (0, 0, 0)).resize((SIDE, SIDE))]
    short = min(picture.size)
    scaled = [SIDE if side == short else int(SIDE * side / short) for side in picture.size]
    left, top = ((side - SIDE) // 2 for side in scaled)
    return [picture.resize(scaled).crop((left, top, left + SIDE, top + SIDE))]


@pytest.mark.parametrize("aspect", ["anyres", "pad", None])
@pytest.mark.parametrize("size", [(640, 480), (1180, 310), (263, 901), (2000, 1999)])
def test_boxes_are_where_the_patch_looks(aspect, size) -> None:
    """Painting exactly the pixels of a token's box lights its patch, and hardly anything else."""
    picture = Image.new("RGB", size)
    tiles = _tiles(size) if aspect == "anyres" else 1
    layout = _geometry(aspect=aspect).layout(tiles, size, stacked=True)
    tokens = layout.sequence[layout.sequence != NEWLINE].tolist()
    for token in [*tokens[5::131], tokens[-1]]:
        box = covered_pixels(layout.box(token), size)
        if box[0] >= box[2] or box[1] >= box[3]:
            continue  # padding
        tile, patch = divmod(token, 576)
        views = _views(_number(picture, box), aspect)
        light = np.asarray(views[tile], dtype=float)[..., 0].reshape(24, 14, 24, 14).mean((1, 3))
        share = light / light.sum()
        assert share.argmax() == patch
        # What the resampling filter spreads: less where a patch covers more pixels.
        assert share.flatten()[patch] > 0.6


@pytest.mark.parametrize("size", [(640, 480), (41, 29), (1180, 310), (263, 901)])
def test_boxes_tile_the_image(size) -> None:
    """Base view and crops each show every pixel once."""
    layout = _layout(size)
    seen = np.zeros((2, size[1], size[0]), dtype=int)
    for token in layout.sequence[layout.sequence != NEWLINE].tolist():
        left, top, right, bottom = covered_pixels(layout.box(token), size)
        seen[int(token >= 576), top:bottom, left:right] += 1
    assert (seen[0] == 1).all()
    # Unpadding rounds to whole patches, so the outermost pixels may lie in a row that is cut.
    assert (seen[1] <= 1).all() and (seen[1] == 1).mean() > 0.9
