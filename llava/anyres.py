"""From pictures to pixels: canvases and tiles of LLaVA-1.6 ("anyres"), squares of LLaVA-1.5."""

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from llava.images import PictureError
from llava.utils import UserInputError
from llava.value_rules import list_of, short_repr, whole

Size = tuple[int, int]

# Those that read the canvas whole: its padding stays, and rows have no newlines.
SPATIAL_PROTOCOLS = ("spatial", "spatial-filled")
NEXT_PROTOCOLS = ("native", "fixed2880", "zoo-release", *SPATIAL_PROTOCOLS)
# (columns, rows) of tiles of the canvases in all released LLaVA-1.6 checkpoints, in their order.
RELEASED_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


# Sides in pixels.
_CANVASES = list_of(list_of(whole(1, 2**14), length=2))

# Of a padded picture, or one scaled until its shorter side fills a tile: 1 GB as RGB.
MAX_ENLARGED_PIXELS = 320_000_000


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """Choose the canvas that keeps the most of an image's pixels.

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: canvases as (width, height).

    Returns:
        The canvas with the most effective pixels, then the least waste; the first one wins a tie.

    Raises:
        UserInputError: there are no canvases.
    """
    return _select_canvas(original_size, possible_resolutions, filled=False)


def select_filled_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """Choose the canvas that an image fills best, however much it is enlarged for that.

    FasterVLM's released code does so. Arguments and result as in `select_best_resolution`; of
    equal shares the smallest canvas wins, then the first.
    """
    return _select_canvas(original_size, possible_resolutions, filled=True)


def _select_canvas(size: Size, canvases: Sequence[Size], filled: bool) -> Size:
    """Return the first canvas of the highest rank under one of the two rules."""
    if not canvases:
        raise UserInputError("no canvas to choose from: image_grid_pinpoints is empty")

    def rank(canvas: Size) -> tuple[float, int]:
        area = math.prod(canvas)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        scaled = int(size[0] * scale) * int(size[1] * scale)
        if filled:
            return scaled / area, -area
        effective = min(scaled, math.prod(size))
        return effective, effective - area

    width, height = max(canvases, key=rank)
    return width, height


def fit_size(original_size: Size, canvas: Size) -> Size:
    """Return (width, height) of an image after it was fitted into a canvas without distortion."""
    width, height = original_size
    target_w, target_h = canvas
    scale_w, scale_h = target_w / width, target_h / height
    if scale_w < scale_h:
        return target_w, min(math.ceil(height * scale_w), target_h)
    return min(math.ceil(width * scale_h), target_w), target_h


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Fit an image into (width, height) without distortion, centred on black."""
    target_w, target_h = target_resolution
    new_w, new_h = fit_size(image.size, target_resolution)
    canvas = Image.new("RGB", (target_w, target_h), (0, 0, 0))
    canvas.paste(image.resize((new_w, new_h)), ((target_w - new_w) // 2, (target_h - new_h) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into square tiles of `patch_size`, row by row."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: str | Sequence[Size], patch_size: int
) -> Size:
    """Return the tiles of an image's best canvas as (columns, rows).

    Args:
        image_size: (width, height) of the image.
        grid_pinpoints: canvases as (width, height), or a string holding that Python list.
        patch_size: side of a tile in pixels.
    """
    width, height = select_best_resolution(image_size, parse_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def parse_pinpoints(grid_pinpoints: str | Sequence[Size]) -> list[Size]:
    """Read canvases as (width, height), from a list or a string with its Python text.

    Raises:
        UserInputError: the value is neither.
    """
    given = grid_pinpoints
    try:
        if isinstance(given, str):
            given = ast.literal_eval(given)
        return [(width, height) for width, height in _CANVASES.read(given)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserInputError(
            f"image_grid_pinpoints is {short_repr(grid_pinpoints)}; give canvases as "
            "[[width, height], ...], such as "
            "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]"
        ) from error


def next_protocol(model_cfg: Any) -> str:
    """Read `mm_next_protocol` of a model: how LLaVA-1.6 counts the tokens of an image.

    `native`: as the checkpoint was trained. `fixed2880`: every image on a canvas of 2 x 2
    tiles, no unpadding and no newlines, as several papers count. `zoo-release`: native, pruned
    as ZOO-Prune's released code does, see `llava.pruning.allocation`. `spatial`: the canvas of
    `native`, no unpadding and no newlines, and budgets counted tile by tile, as FasterVLM,
    HiPrune, SCOPE, MMTok and VisionZip were released.
    `spatial-filled`: the same on the canvas that the image fills best, as FasterVLM was.

    Raises:
        UserInputError: another word, or a model that does not cut images into tiles.
    """
    protocol = getattr(model_cfg, "mm_next_protocol", None) or "native"
    if protocol not in NEXT_PROTOCOLS:
        raise UserInputError(
            f"mm_next_protocol is {protocol!r}; use one of {', '.join(NEXT_PROTOCOLS)}"
        )
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if protocol != "native" and aspect != "anyres":
        raise UserInputError(
            f"mm_next_protocol {protocol!r} is about images in tiles (image_aspect_ratio "
            f"'anyres'), but this model has image_aspect_ratio {aspect!r}; use 'native'"
        )
    return protocol


def canvas_rule(model_cfg: Any) -> Callable[[Size, Sequence[Size]], Size]:
    """Return how a model chooses a canvas: `select_best_resolution`, or as its protocol says."""
    filled = next_protocol(model_cfg) == "spatial-filled"
    return select_filled_resolution if filled else select_best_resolution


def canvas_choices(model_cfg: Any, tile_side: int) -> list[Size]:
    """Return the canvases, (width, height) in pixels, that an image may be fitted into.

    `image_grid_pinpoints`; where the config has none, those of the released LLaVA-1.6
    checkpoints for this side of a tile.

    Raises:
        UserInputError: canvases that tiles of `tile_side` pixels do not fill.
    """
    if next_protocol(model_cfg) == "fixed2880":
        return [(2 * tile_side, 2 * tile_side)]
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    if pinpoints is None:
        return [(cols * tile_side, rows * tile_side) for cols, rows in RELEASED_GRIDS]
    canvases = parse_pinpoints(pinpoints)
    if any(side % tile_side for canvas in canvases for side in canvas):
        raise UserInputError(
            f"image_grid_pinpoints {canvases} has sides that are not multiples of the vision "
            f"tower's {tile_side} pixels; correct it in config.json"
        )
    return canvases


def unpad_image(tensor: torch.Tensor, original_size: Size) -> torch.Tensor:
    """Cut away what fitting an image into a canvas had padded.

    Args:
        tensor: [C, H, W] on the canvas.
        original_size: (width, height) of the image before it was fitted.

    Returns:
        [C, rows, cols], a view.
    """
    top, left, rows, cols = unpad_window(tensor.shape[1], tensor.shape[2], original_size)
    return tensor[:, top : top + rows, left : left + cols]


def unpad_window(height: int, width: int, original_size: Size) -> tuple[int, int, int, int]:
    """Return (top, left, rows, cols): what `unpad_image` leaves of a map of height x width."""
    original_w, original_h = original_size
    if original_w / original_h > width / height:
        padding = (height - int(original_h * (width / original_w))) // 2
        return padding, 0, height - 2 * padding, width
    padding = (width - int(original_w * (height / original_h))) // 2
    return 0, padding, height, width - 2 * padding


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """Pad an image to a square, centred; a square image is returned as it is (same object)."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


def process_anyres_image(
    image: Image.Image,
    processor: Any,
    grid_pinpoints: str | Sequence[Size],
    choose: Callable[[Size, Sequence[Size]], Size] = select_best_resolution,
) -> torch.Tensor:
    """Show an image as LLaVA-1.6 sees it: first whole, then the tiles of its best canvas.

    Args:
        image: an RGB image.
        processor: the tower's processor.
        grid_pinpoints: canvases as (width, height), or a string holding that Python list.
        choose: which of them an image of a size gets.

    Returns:
        float32 [1 + tiles, 3, H, W]; tiles row by row. The whole image is resized to a square
        without regard to its aspect.
    """
    canvas = choose(image.size, parse_pinpoints(grid_pinpoints))
    tile = tile_side(processor)
    side = processor.size.get("shortest_edge") or tile
    views = [image.resize((side, side))]
    views += divide_to_patches(resize_and_pad_image(image, canvas), tile)
    return torch.stack([_preprocess(view, processor) for view in views])


def tile_side(processor: Any) -> int:
    """Return the side in pixels of the squares that a processor makes, cropped or resized."""
    return (getattr(processor, "crop_size", None) or processor.size)["height"]


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Turn PIL images into the pixels a model was trained on.

    `model_cfg.image_aspect_ratio` decides: `"pad"` pads to a square with the processor's mean
    colour; `"anyres"` makes tiles, see `process_anyres_image`; None or anything else leaves the
    image to the processor: CLIP's resizes the shorter side and crops the centre, SigLIP's squeezes
    the whole image into a square.

    Args:
        images: PIL images of any mode; they are converted to RGB.
        image_processor: the tower's processor.
        model_cfg: the model's config.

    Returns:
        float32 [B, 3, H, W] (anyres: [B, T, 3, H, W]), or a list where the shapes differ.

    Raises:
        UserInputError: a kind of tiles that LLaVA-1.6 does not have.
        PictureError: a picture so long and thin that the way to its tile takes more than
            `MAX_ENLARGED_PIXELS`.
    """
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if isinstance(aspect, str) and aspect.startswith("anyres") and aspect != "anyres":
        raise UserInputError(
            f"image_aspect_ratio {aspect!r} belongs to models after LLaVA-1.6, which this version "
            "does not process; use a LLaVA-1.5 or 1.6 checkpoint"
        )
    next_protocol(model_cfg)  # refuses one that has no effect on these images
    images = [image.convert("RGB") for image in images]
    if aspect == "anyres":
        canvases = canvas_choices(model_cfg, tile_side(image_processor))
        choose = canvas_rule(model_cfg)
        pixels = [
            process_anyres_image(image, image_processor, canvases, choose) for image in images
        ]
    else:
        for image in images:
            _refuse_strip(image.size, aspect, image_processor)
        if aspect == "pad":
            red, green, blue = (int(mean * 255) for mean in image_processor.image_mean)
            images = [expand2square(image, (red, green, blue)) for image in images]
        pixels = [_preprocess(image, image_processor) for image in images]
    return pixels if len({p.shape for p in pixels}) > 1 else torch.stack(pixels)


def _preprocess(image: Image.Image, processor: Any) -> torch.Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def _refuse_strip(size: Size, aspect: str | None, processor: Any) -> None:
    """Raise PictureError for a picture that would fill the memory on its way to a square."""
    short, long = sorted(size)
    if aspect == "pad":
        enlarged = long * long
    else:  # a processor without a shortest edge squeezes, and makes nothing larger than its tile
        edge = processor.size.get("shortest_edge") or 0
        enlarged = edge * edge * long // max(short, 1)
    if enlarged > MAX_ENLARGED_PIXELS:
        raise PictureError(
            f"a picture of {size[0]} x {size[1]} pixels is too long and thin: made a square, it "
            f"would take {enlarged / 1e6:.0f} million pixels; cut it into parts, or scale it down"
        )
