"""What becomes of a picture's pixels: as a viewer shows them, or as LLaVA reads them."""

from __future__ import annotations

import base64
import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, features

from llava import images
from llava.images import decode_image, open_image
from llava.mm_utils import load_image_from_base64, process_images
from llava.utils import UserInputError

NOISE = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)
GREY = NOISE[:, :, 0]
ALPHA = (np.arange(24, dtype=np.uint8) * 11).reshape(4, 6)
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def file_of(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def grey_file(values: np.ndarray, kind: str = "TIFF", **settings: Any) -> bytes:
    return file_of(Image.fromarray(values), kind, **settings)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: tuple) -> bytes:
    """A PNG of kinds that Pillow does not write; `more` are chunks before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def with_tag(content: bytes, tag: int, before: int, after: int) -> bytes:
    """A little-endian TIFF with one 16-bit tag changed."""
    entry = struct.pack("<HHIHH", tag, 3, 1, before, 0)
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHIHH", tag, 3, 1, after, 0))


def offset_gif() -> bytes:
    """A red frame of 2 x 2 at (1, 1) of a 4 x 4 picture whose first colour is green."""
    frame = Image.new("P", (2, 2), 1)
    frame.putpalette([0, 255, 0, 255, 0, 0] + [0] * 762)
    content = bytearray(file_of(frame, "GIF", optimize=False))
    content[6:10] = struct.pack("<HH", 4, 4)
    place = content.rindex(b"\x2c\0\0\0\0\x02\0\x02\0")
    content[place + 1 : place + 5] = struct.pack("<HH", 1, 1)
    return bytes(content)


def original(content: bytes) -> np.ndarray:
    """LLaVA's reading, word for word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def read(content: bytes, pixels: str = "viewer") -> np.ndarray:
    image = decode_image(content, "image x", pixels)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return np.rint(colour * share + 255 * (1 - share))


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, 2)


ROTATED = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 90}, "TIFF": {}}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ROTATED)
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(RGB, kind, exif=exif, **ROTATED[kind])
    stored = original(file_of(RGB, kind, **ROTATED[kind]))
    assert np.array_equal(read(content), UPRIGHT[orientation](stored))
    assert np.array_equal(read(content, "original"), original(content))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "CMYK"])
def test_a_turned_tiff_is_read_from_a_file_as_from_memory(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    """Pillow reads some turned TIFFs wrongly where it maps the file into memory."""
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else RGB.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(image, "TIFF", exif=exif)
    (tmp_path / "x.tiff").write_bytes(content)
    upright = UPRIGHT[orientation](read(file_of(image, "TIFF")))
    for pixels in ("viewer", "original"):
        found = np.asarray(open_image(tmp_path / "x.tiff", pixels))
        assert np.array_equal(found, read(content, pixels))
        assert pixels == "original" or np.array_equal(found, upright)


def test_a_picture_of_two_pictures() -> None:
    """MPO, as phones write it, with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = 8
    content = file_of(RGB, "MPO", save_all=True, append_images=[RGB], exif=exif)
    assert np.array_equal(read(content), np.rot90(original(content), 1))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = file_of(RGB, "AVIF", exif=exif)
    assert np.array_equal(read(content), np.rot90(original(content), -1))


DEEP = GREY.astype(np.uint16) * 257
LEVELS = GREY.astype(np.int32)
TIFF_16 = grey_file(DEEP)
GREYS: dict[str, tuple[bytes, np.ndarray]] = {
    "16-bit PNG": (grey_file(DEEP, "PNG"), GREY),
    "16-bit TIFF": (TIFF_16, GREY),
    "16-bit big-endian TIFF": (grey_file(DEEP.astype(">u2")), GREY),
    "16-bit TIFF, white is zero": (with_tag(TIFF_16, 262, 1, 0), 255 - GREY),
    "16-bit PGM": (b"P5\n6 4\n65535\n" + DEEP.astype(">u2").tobytes(), GREY),
    "10-bit PGM": (b"P5\n6 4\n1020\n" + (GREY * np.uint16(4)).astype(">u2").tobytes(), GREY),
    "16-bit JPEG 2000": (grey_file(DEEP, "JPEG2000"), GREY),
    "32-bit, 8 used": (grey_file(LEVELS), GREY),
    "32-bit, 16 used": (grey_file(LEVELS * 257), GREY),
    "32-bit, 31 used": (grey_file(LEVELS * 8421504), GREY),
    "32-bit unsigned": (
        with_tag(grey_file((LEVELS * 16843009).astype(np.uint32).view(np.int32)), 339, 2, 1),
        GREY,
    ),
    "32-bit, dark": (
        grey_file(np.array([[300, 900, 1500]], np.int32)),
        np.array([[0, 128, 255]]),
    ),
    "32-bit, negative": (grey_file(np.array([[-9, -4, 1]], np.int32)), np.array([[0, 128, 255]])),
    "float from 0 to 1": (grey_file((GREY / 255).astype(np.float32)), GREY),
    "float from 0 to 255": (grey_file(GREY.astype(np.float32)), GREY),
    "float beyond 1": (
        grey_file(np.array([[-0.1, 0.6, 1.1]], np.float32)),
        np.array([[0, 149, 255]]),
    ),
    "float with holes": (
        grey_file(np.array([[np.nan, 0.2, np.inf, -np.inf]], np.float32)),
        np.array([[0, 51, 255, 0]]),
    ),
    "float of one value": (grey_file(np.full((2, 2), -3.5, np.float32)), np.zeros((2, 2))),
}


@pytest.mark.parametrize("name", GREYS)
def test_deep_grey_is_scaled_to_8_bits(name: str) -> None:
    content, expected = GREYS[name]
    assert np.array_equal(read(content), three(expected))
    assert np.array_equal(read(content, "original"), original(content))


def test_twelve_bits() -> None:
    values = np.array([[0, 2048, 4095, 0]], np.uint16)
    content = with_tag(grey_file(values), 258, 16, 12)
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 000 800 FFF 000
    start = content.index(values.tobytes())
    content = content[:start] + packed + content[start + len(packed) :]
    assert read(content)[0, :, 0].tolist() == [0, 128, 255, 0]


P = RGB.convert("P")
P_RGB = np.asarray(P.convert("RGB"))
GLASS = Image.fromarray(np.dstack([NOISE, ALPHA]))
FOG = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
LA_TIFF = file_of(FOG, "TIFF")
HIDDEN = np.where((GREY[0, 0] == GREY)[..., None], 255, three(GREY))
CLEAR: dict[str, tuple[bytes, np.ndarray]] = {
    "RGBA PNG": (file_of(GLASS, "PNG"), over_white(NOISE, ALPHA)),
    "RGBA WebP": (file_of(GLASS, "WEBP", lossless=True, exact=True), over_white(NOISE, ALPHA)),
    "RGBA TIFF": (file_of(GLASS, "TIFF"), over_white(NOISE, ALPHA)),
    "LA PNG": (file_of(FOG, "PNG"), over_white(three(GREY), ALPHA)),
    "LA TIFF": (LA_TIFF, over_white(three(GREY), ALPHA)),
    "one clear colour of a palette": (
        file_of(P, "PNG", transparency=P.getpixel((0, 0))),
        np.where((np.asarray(P) == P.getpixel((0, 0)))[..., None], 255, P_RGB),
    ),
    "a palette with alpha": (
        file_of(P, "PNG", transparency=bytes(range(256))),
        over_white(P_RGB, np.asarray(P)),
    ),
    "clear GIF": (
        file_of(P, "GIF", transparency=P.getpixel((0, 0))),
        np.where((np.asarray(P) == P.getpixel((0, 0)))[..., None], 255, P_RGB),
    ),
    "first frame of a GIF": (
        file_of(
            P, "GIF", save_all=True, append_images=[P.rotate(180)], transparency=P.getpixel((0, 0))
        ),
        np.where((np.asarray(P) == P.getpixel((0, 0)))[..., None], 255, P_RGB),
    ),
    "a clear colour": (
        file_of(RGB, "PNG", transparency=RGB.getpixel((0, 0))),
        np.where((NOISE[0, 0] == NOISE).all(-1)[..., None], 255, NOISE),
    ),
    "a clear grey": (
        file_of(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0])),
        HIDDEN,
    ),
    "a clear deep grey": (
        file_of(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[0, 0])),
        HIDDEN,
    ),
    "a clear black of 1 bit": (
        png(8, 1, 1, 0, b"\0\x0f", (b"tRNS", b"\0\0")),
        np.full((1, 8, 3), 255),
    ),
    "a clear grey of 2 bits": (
        png(4, 1, 2, 0, b"\0\x1b", (b"tRNS", b"\0\1")),
        three([[0, 255, 170, 255]]),
    ),
    "a clear grey of 4 bits": (
        png(2, 1, 4, 0, b"\0\x12", (b"tRNS", b"\0\1")),
        three([[255, 34]]),
    ),
    "a clear colour of 48 bits": (
        png(
            *(2, 1, 16, 2, b"\0" + struct.pack(">6H", 1000, 20000, 65535, 0, 40000, 257)),
            (b"tRNS", struct.pack(">3H", 1000, 20000, 65535)),
        ),
        np.array([[[255, 255, 255], [0, 156, 1]]]),
    ),
    "deep grey with alpha": (
        png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 1000, 0, 40000, 65535)),
        three([[255, 156]]),
    ),
    "an APNG": (
        file_of(GLASS, "PNG", save_all=True, append_images=[GLASS.rotate(180)]),
        over_white(NOISE, ALPHA),
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_over_white(name: str) -> None:
    content, expected = CLEAR[name]
    difference = np.abs(read(content).astype(float) - expected)
    assert difference.max() <= 1, difference  # rounding
    assert np.array_equal(read(content, "original"), original(content))


def test_premultiplied_grey() -> None:
    """Pillow 13 opens it and converts it to nothing but LA: LLaVA's own reading fails."""
    if int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} cannot open such a TIFF at all")
    content = with_tag(file_of(Image.new("LA", (2, 1), (100, 128)), "TIFF"), 338, 2, 1)
    assert np.abs(read(content).astype(int) - (100 + 127)).max() <= 1
    with pytest.raises(UserInputError, match=r"image x: .* fails on La .* use --pixels viewer"):
        read(content, "original")


def test_a_gif_frame_smaller_than_its_picture() -> None:
    shown = read(offset_gif())
    assert (shown[1:3, 1:3] == [255, 0, 0]).all()
    assert (shown[0] == 255).all() and (shown[3] == 255).all() and (shown[:, 0] == 255).all()
    assert np.array_equal(read(offset_gif(), "original"), original(offset_gif()))


def orientation_and(mode: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = {"RGBA": GLASS, "I;16": Image.fromarray(DEEP), "P": P}[mode]
    settings = {"transparency": P.getpixel((0, 0))} if mode == "P" else {}
    return file_of(image, "PNG", exif=exif, **settings)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_both_at_once(mode: str) -> None:
    flat = {"RGBA": "RGBA PNG", "I;16": "16-bit PNG", "P": "one clear colour of a palette"}[mode]
    content = (CLEAR | GREYS)[flat][0]
    assert np.array_equal(read(orientation_and(mode)), np.rot90(read(content), -1))


SAME: dict[str, bytes] = {
    "RGB": file_of(RGB, "PNG"),
    "grey": file_of(RGB.convert("L"), "PNG"),
    "one bit": file_of(RGB.convert("1"), "PNG"),
    "one bit TIFF": file_of(RGB.convert("1"), "TIFF"),
    "palette": file_of(P, "PNG"),
    "opaque alpha": file_of(RGB.convert("RGBA"), "PNG"),
    "a palette without a clear pixel": file_of(P, "PNG", transparency=b"\xff" * 256),
    "JPEG": file_of(RGB, "JPEG"),
    "CMYK JPEG": file_of(RGB.convert("CMYK"), "JPEG"),
    "CMYK TIFF": file_of(RGB.convert("CMYK"), "TIFF"),
    "48 bits": png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 1000, 20000, 65535)),
    "LAB": file_of(RGB.convert("LAB"), "TIFF"),
    "BMP": file_of(RGB, "BMP"),
    "GIF": file_of(P, "GIF"),
}


@pytest.mark.parametrize("name", SAME)
def test_other_pictures_are_the_same_in_both(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for pixels in ("viewer", "original"):
        assert np.array_equal(read(SAME[name], pixels), original(SAME[name]))
    assert not caplog.records


@pytest.mark.parametrize("exif", [b"junk", b"II*\0\x08\0\0\0\xff\xff", b""])
def test_damaged_exif_data_turn_nothing(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    content = png(2, 1, 8, 0, b"\0\1\2", (b"eXIf", exif))
    assert read(content)[0, :, 0].tolist() == [1, 2]
    assert not recwarn.list


def test_sizes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (4, 6)
    assert open_image(tmp_path / "a.png", "original").size == (6, 4)


def test_a_picture_that_differs_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_noted", set())
    (tmp_path / "a.png").write_bytes(orientation_and("RGBA"))
    (tmp_path / "b.png").write_bytes(file_of(RGB, "PNG"))
    (tmp_path / "c.png").write_bytes(GREYS["16-bit PNG"][0])
    with caplog.at_level(logging.INFO, logger="llava.images"):
        for name in ("a.png", "b.png", "a.png", "c.png"):
            open_image(tmp_path / name)
    first, second = (record.getMessage() for record in caplog.records)
    assert f"{tmp_path / 'a.png'} has EXIF orientation 6 and transparency" in first
    assert "as a viewer shows it" in first and "--pixels original" in first
    assert f"{tmp_path / 'c.png'} has grey of more than 8 bits (I;16)" in second
    caplog.clear()
    open_image(tmp_path / "a.png", "original")
    (record,) = caplog.records
    assert "read as LLaVA reads it" in record.getMessage()
    assert "--pixels viewer" in record.getMessage() and "\n" not in record.getMessage()


def test_long_paths_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_noted", set())
    folder = tmp_path / ("f" * 140)
    folder.mkdir()
    for name in ("one.png", "two.png"):
        (folder / name).write_bytes(orientation_and("RGBA"))
        open_image(folder / name)
    assert ["one.png" in record.getMessage() for record in caplog.records] == [True, False]


def test_an_unknown_reading(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    with pytest.raises(UserInputError, match="pixels is 'raw'; use viewer or original"):
        open_image(tmp_path / "a.png", "raw")


def test_images_that_callers_open_themselves_are_converted_as_before() -> None:
    """`process_images` is LLaVA's: what reaches it as a PIL image is converted to RGB."""

    class Processor:
        image_mean = (0.5, 0.5, 0.5)
        size = {"shortest_edge": 4}  # noqa: RUF012

        def preprocess(self, image: Image.Image, return_tensors: str) -> dict[str, Any]:
            import torch

            return {"pixel_values": [torch.from_numpy(np.array(image))]}

    pixels = process_images([GLASS], Processor(), None)
    assert np.array_equal(np.asarray(pixels[0]), np.asarray(GLASS.convert("RGB")))


def test_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    """Two overlapping changes of Python's filters could leave the second one in place."""
    RGB.save(tmp_path / "a.png")
    before = list(warnings.filters)
    barrier = threading.Barrier(4)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(200):
                open_image(tmp_path / "a.png")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and list(warnings.filters) == before


def bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, bytes(1000))


BASE64: dict[str, tuple[Any, str]] = {
    "cut": (base64.b64encode(file_of(RGB, "PNG")[:-40]).decode(), "cut short"),
    "108 megapixels": (base64.b64encode(bomb(12_000, 9_000)).decode(), "too large"),
    "81 megapixels": (base64.b64encode(bomb(9_000, 9_000)).decode(), "too large"),
    "3600 megapixels": (base64.b64encode(bomb(60_000, 60_000)).decode(), "too large"),
    "no image": (base64.b64encode(b"no image").decode(), "not an image that can be read"),
    "no base64": ("?%&/", "not base64 text"),
    "bad padding": ("abc", "not base64 text"),
    "empty": ("", "is empty"),
    "blank": (" \n", "is empty"),
    "null": (None, "not base64 text"),
    "number": (7, "not base64 text"),
    "other letters": ("bilä", "not base64 text"),
    "a data URL of text": ("data:text/plain,hello", "not base64 text"),
}


@pytest.mark.parametrize("name", BASE64)
def test_base64_that_holds_no_usable_picture(name: str) -> None:
    text, message = BASE64[name]
    with pytest.raises(UserInputError, match=rf"^the image .*{message}") as no:
        load_image_from_base64(text)
    assert "\n" not in str(no.value)


def test_base64_as_people_write_it() -> None:
    text = base64.encodebytes(file_of(GLASS, "PNG")).decode()
    wanted = over_white(NOISE, ALPHA)
    for form in (text, text.strip(), f"data:image/png;base64,{text}", text.encode()):
        image = load_image_from_base64(form)
        assert np.abs(np.asarray(image).astype(float) - wanted).max() <= 1
