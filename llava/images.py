"""Pictures that users name, on disk or on the web: fetched within limits, checked, decoded.

`open_image` is how every command opens a picture; what it makes of orientation, deep grey and
transparency is said in `llava.pixels`. A picture from elsewhere is untrusted input. Only http and
https are spoken (also after a redirect), a download ends at a size and at a time, the pixel count
is read before anything is decoded, and only raster formats are decoded, none that runs another
program.
"""

import base64
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava.pixels import VIEWER, check_pixels, read_pixels, warnings_as
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 80_000_000  # 240 MB as RGB; Pillow itself starts to warn a little later
MAX_BYTES = 64 * 2**20  # of a download
SILENCE_SECONDS = 15.0  # a server that says nothing for so long has gone
DOWNLOAD_SECONDS = 60.0  # for the whole body, however steadily it arrives

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://|(data):", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_CHUNK = 64 * 2**10
_noted: set[str] = set()  # lines that were logged: one a picture


class PictureError(UserInputError):
    """One picture cannot be shown to a model; others can."""


def open_image(location: str | Path, pixels: str = VIEWER) -> Image.Image:
    """Open the picture at a path or an http(s) URL, as RGB; of an animation the first frame.

    Logs one line for a picture that the two readings show differently.

    Args:
        location: path or URL.
        pixels: `viewer` or `original`, see `llava.pixels`.

    Raises:
        UserInputError: no such picture, one over the limits of this module, or no picture at all.
    """
    check_pixels(pixels)
    name = f"image {_short(location)}"
    scheme = _SCHEME.match(str(location))
    if scheme is None:
        return _decode(_existing_file(location), name, pixels)
    protocol = (scheme[1] or scheme[2]).lower()
    if protocol not in ("http", "https"):
        raise UserInputError(
            f"cannot read {name}: {protocol} is not supported; give a path or an http(s) URL"
        )
    return _decode(BytesIO(_download(str(location))), name, pixels)


load_image = open_image  # LLaVA's name for it


def decode_image(content: bytes, name: str, pixels: str = VIEWER) -> Image.Image:
    """Decode the bytes of a picture's file, as `open_image` does; errors call it `name`."""
    check_pixels(pixels)
    return _decode(BytesIO(content), name, pixels)


def decode_base64(text: str | bytes, name: str, pixels: str = VIEWER) -> Image.Image:
    """Decode a picture whose file is written as base64 text, as `open_image` does.

    Args:
        text: base64, perhaps as a data URL; white space in it is skipped.
        name: what errors call the picture, such as "the image of row 7".
        pixels: `viewer` or `original`.

    Raises:
        UserInputError: text without a picture, and all that `open_image` refuses.
    """
    try:
        letters = text.decode("ascii") if isinstance(text, bytes) else text
        prefix = _DATA_URL.match(letters)
        letters = "".join(letters[prefix.end() if prefix else 0 :].split())
        content = base64.b64decode(letters, validate=True)
    except (TypeError, ValueError) as error:
        raise UserInputError(
            f"{name} is not base64 text ({error}); encode the bytes of an image file"
        ) from error
    if not content:
        raise UserInputError(f"{name} is missing: its text is empty; encode an image file")
    return decode_image(content, name, pixels)


def _existing_file(location: str | Path) -> Path:
    try:
        path = user_path(location)
        found, is_file = path.exists(), path.is_file()
    except (OSError, ValueError):  # impossible names
        found = is_file = False
    if not found:
        raise UserInputError(f"cannot read image {_short(location)}: no such file; check the path")
    if not is_file:  # reading a pipe or a device might never end
        raise UserInputError(f"cannot read image {location}: this is not a file; give one picture")
    return path


def _decode(source: Path | BytesIO, name: str, pixels: str) -> Image.Image:
    """Decode a picture whose size is known to be within the limit; errors call it `name`."""
    try:
        # Not by its path: Pillow would map the file, and read some turned TIFFs wrongly.
        with source.open("rb") if isinstance(source, Path) else source as file:
            with warnings_as("error", Image.DecompressionBombWarning):
                image = Image.open(file, formats=_readable())
            with image:
                _check_size(image.size, name)
                shown, note = read_pixels(image, pixels, name)
    except UserInputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "perhaps a decompression bomb") from error
    except UnidentifiedImageError as error:
        raise UserInputError(
            f"{name} is not an image that can be read; give one of {', '.join(_readable())}"
        ) from error
    except PermissionError as error:
        raise UserInputError(
            f"cannot read {name}: permission denied; make the file readable"
        ) from error
    except Exception as error:  # decoders raise errors without a common base
        raise UserInputError(
            f"{name} is damaged or cut short ({one_line(error)}); download or save it again"
        ) from error
    if note is not None and note not in _noted:
        _noted.add(note)
        logger.warning(note)
    return shown


def _readable() -> list[str]:
    """List those of FORMATS that this build of Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UserInputError(f"{name} has no pixels ({width} x {height}); give another")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height}")


def _too_large(name: str, size: str) -> UserInputError:
    return UserInputError(
        f"{name} is too large ({size}; at most {MAX_PIXELS / 1e6:g} million pixels "
        "are decoded); scale it down first"
    )


def _download(url: str) -> bytes:
    """Download the body of a URL, within the limits of size and time."""
    request = urllib.request.Request(url, headers={"User-Agent": "llava", "Accept": "image/*"})
    try:
        with _opener().open(request, timeout=SILENCE_SECONDS) as response:
            return _body(response, url)
    except UserInputError:
        raise
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
    except TimeoutError:
        reason = f"the server is silent for {SILENCE_SECONDS:g} s"
    except urllib.error.URLError as error:
        reason = str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
    reason = " ".join(reason.split())
    raise UserInputError(
        f"cannot download {_short(url)}: {reason}; check the URL, or download it and give its path"
    )


def _opener() -> urllib.request.OpenerDirector:
    """Make an opener that speaks http and https only, so that no redirect leads elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _body(response: http.client.HTTPResponse, url: str) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    body = bytearray()
    while chunk := response.read1(_CHUNK):  # one read of the socket, so the clock is looked at
        body += chunk
        if len(body) > MAX_BYTES:
            raise UserInputError(
                f"{_short(url)} is larger than {MAX_BYTES // 2**20} MiB; download it, scale it "
                "down and give its path"
            )
        if time.monotonic() > deadline:
            raise UserInputError(
                f"{_short(url)} did not arrive within {DOWNLOAD_SECONDS:g} s; download it and give "
                "its path"
            )
    return bytes(body)


def _short(name: str | Path) -> str:
    text = str(name)
    return text if len(text) <= 120 else f"{text[:57]}...{text[-60:]}"  # files differ at the end
