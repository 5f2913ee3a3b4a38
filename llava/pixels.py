"""From a decoded picture to RGB: as a viewer shows it, or as LLaVA itself reads it.

`viewer` turns the picture upright, scales grey values of more than 8 bits down to 8, and puts
transparent pixels over white. `original` is LLaVA's `Image.open(path).convert("RGB")`, which
published figures were measured with: it leaves the picture as the sensor had it, cuts deep grey
off at 255, and shows the colour that happens to lie under transparent pixels, mostly black.
The two are equal for everything else. Neither applies colour profiles.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from llava.utils import UserInputError

VIEWER, ORIGINAL = "viewer", "original"
PIXELS = (VIEWER, ORIGINAL)
PIXELS_HELP = "read pictures as a viewer shows them, or as LLaVA's own code does"

_ORIENTATION = 0x0112  # a tag of EXIF and of TIFF
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
# Not `ImageOps.exif_transpose`: it also writes the EXIF data back, and fails where these are odd.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = threading.Lock()
_RANGES = (2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)  # what white is, by bits of a grey value


@contextmanager
def warnings_as(action: Literal["error", "ignore"], category: type[Warning]) -> Iterator[None]:
    """Raise or drop warnings of a category, in one thread at a time.

    Python keeps its filters for the whole process: two threads that changed them at once could
    leave them changed for good.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter(action, category)
        yield


def check_pixels(pixels: str) -> None:
    """Refuse a reading that does not exist.

    Raises:
        UserInputError: names those that do.
    """
    if pixels not in PIXELS:
        raise UserInputError(f"pixels is {pixels!r}; use {' or '.join(PIXELS)}")


def read_pixels(image: Image.Image, pixels: str, name: str) -> tuple[Image.Image, str | None]:
    """Read an opened picture that has not been loaded yet.

    Args:
        image: what `Image.open` returned; of an animation its first frame is read.
        pixels: `viewer` or `original`.
        name: what the note and errors call the picture.

    Returns:
        The picture as RGB, and one line where the other reading differs from it, else None.

    Raises:
        UserInputError: `original` for a kind of picture that LLaVA's own reading fails on.
        Exception: whatever Pillow's decoder raises for a damaged file.
    """
    frame, raw_mode = _frame(image), _raw_mode(image)
    image.load()
    orientation = _orientation(image)
    differences = [
        text
        for text, found in (
            (f"EXIF orientation {orientation}", orientation in _UPRIGHT),
            (f"grey of more than 8 bits ({image.mode})", _is_deep(image)),
            ("transparency", image.has_transparency_data),
            ("a frame smaller than the picture", frame is not None),
        )
        if found
    ]
    if not differences:
        return image.convert("RGB"), None
    try:
        original = _original(image)
    except ValueError as error:
        if pixels == ORIGINAL:
            raise UserInputError(
                f"{name}: LLaVA's own reading fails on {image.mode} pictures ({error}); use "
                f"--pixels {VIEWER}"
            ) from error
        original = None
    shown = _viewer(image, orientation, frame, raw_mode)
    chosen = shown if original is None or pixels == VIEWER else original
    if original is not None and _equal(original, shown):
        return chosen, None
    return chosen, _note(name, pixels, " and ".join(differences))


def _viewer(
    image: Image.Image, orientation: int, frame: tuple[int, int, int, int] | None, raw_mode: str
) -> Image.Image:
    if _is_deep(image):
        rgb = _grey(image).convert("RGB")
    elif image.has_transparency_data:
        rgb = _over_white(image, raw_mode)
    else:
        rgb = image.convert("RGB")
    if frame is not None:
        canvas = Image.new("RGB", rgb.size, "white")
        canvas.paste(rgb.crop(frame), frame[:2])
        rgb = canvas
    turn = _UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _original(image: Image.Image) -> Image.Image:
    """Read as LLaVA does.

    Raises:
        ValueError: one of the few modes that Pillow cannot convert.
    """
    if "transparency" in image.info:  # it changes no pixel, and Pillow would warn about it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _equal(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def _orientation(image: Image.Image) -> int:
    """Return the orientation in the picture's EXIF data, 1 to 8; 1 where these cannot be read."""
    try:
        with warnings_as("ignore", UserWarning):
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data, which viewers ignore; parsers have no common error
        return 1
    return found if isinstance(found, int) else 1


def _frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return where the first frame of a GIF lies, if it does not cover the picture."""
    if image.format != "GIF" or not getattr(image, "tile", None):
        return None
    left, top, right, bottom = image.tile[0][1]  # type: ignore[attr-defined]
    box = (left, top, right, bottom)
    return None if box == (0, 0, *image.size) else box


def _raw_mode(image: Image.Image) -> str:
    """Return how the samples of a PNG lie in the file, such as `RGB;16B`; else empty."""
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    return str(tiles[0][3]) if tiles else ""


def _is_deep(image: Image.Image) -> bool:
    """Whether a picture is grey with more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _over_white(image: Image.Image, raw_mode: str) -> Image.Image:
    """Put a picture with transparency on a white ground, RGB."""
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB") and key is not None:
        # A PNG writes the transparent colour in its own depth, its pixels are in 8 bits by now.
        scale: dict[str, Callable[[int], int]] = {
            "L;2": lambda value: value * 85,
            "L;4": lambda value: value * 17,
            "RGB;16B": lambda value: value >> 8,
        }
        if raw_mode in scale:
            change = scale[raw_mode]
            image = image.copy()
            image.info["transparency"] = (
                tuple(map(change, key)) if isinstance(key, tuple) else change(key)
            )
    if image.mode == "La":  # TIFF's premultiplied grey, which Pillow turns into LA only
        image = image.convert("LA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Scale deep grey to 8 bits.

    16 bits are scaled by their full range (a TIFF's 12 by theirs). 32-bit integers and floats have
    no agreed white. Floats within [0, 1] are scaled by that. Whole numbers are scaled by the
    smallest range of 8, 16, 31 or 32 bits that holds them, where they use more than a sixteenth of
    it. Everything else is stretched from its darkest (black) to its brightest value (white). What
    is not a number is black.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        full = 4095 if tags.get(_BITS) == (12,) else 65535
        table = np.minimum((np.arange(65536) * 255 + full // 2) // full, 255).astype(np.uint8)
        grey = table[values]
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
    else:
        if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT) == (1,):
            values = values.view(np.uint32)  # Pillow holds unsigned values as signed ones
        levels = image.mode == "I" and image.format == "PPM"  # PGM: Pillow scales them to 16 bits
        black, white = (0, 65535) if levels else _ends(values)
        grey = _scaled(values, black, white)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Return the values that stand for black and white, by the rules of `_grey`."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    floats = values.dtype.kind == "f"
    if floats and low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and not (floats and (finite != np.floor(finite)).any()):
        full = next((full for full in _RANGES if high <= full), None)
        if full is not None and (full == _RANGES[0] or high > full / 16):
            return 0.0, float(full)
    return low, high


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Scale to uint8 [H, W]: 0 at and below `black`, 255 at and above `white`."""
    share = (values.astype(np.float64) - black) / (white - black or 1.0)
    return np.rint(np.clip(np.nan_to_num(share, nan=0.0), 0, 1) * 255).astype(np.uint8)


def _note(name: str, pixels: str, difference: str) -> str:
    if pixels == VIEWER:
        return (
            f"{name} has {difference}: read as a viewer shows it; LLaVA's own reading "
            f"(--pixels {ORIGINAL}) is another"
        )
    return (
        f"{name} has {difference}: read as LLaVA reads it; a viewer (--pixels {VIEWER}) shows "
        "something else"
    )
