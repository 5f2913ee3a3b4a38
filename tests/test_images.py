"""Pictures from disk and from the web: what is read, and every limit that refuses one."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava import images
from llava.images import load_image
from llava.utils import UserInputError


def png(mode: str = "RGB") -> bytes:
    """A small picture of two colours."""
    picture = Image.new(mode, (6, 4))
    picture.paste(1, (0, 0, 3, 4)) if mode == "P" else picture.paste("red", (0, 0, 3, 4))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size; a decoder would unpack zeros to it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


Answer = Callable[[BaseHTTPRequestHandler], None]


class Handler(BaseHTTPRequestHandler):
    """Answers by the table of the test."""

    def __init__(self, table: dict[str, Answer], *args: object) -> None:
        self.table = table
        super().__init__(*args)

    def do_GET(self) -> None:
        self.table[self.path](self)

    def log_message(self, *_: object) -> None:
        pass


def body(content: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def silence(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b"x")
        except OSError:
            return  # the client has had enough, which is the point
        time.sleep(0.02)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """``serve(path=answer)``: a server on this machine; returns its address."""
    monkeypatch.setenv("no_proxy", "*")
    running = []

    def start(table: dict[str, Answer]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, table))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(mode))
    for location in (path, str(path)):
        image = load_image(location)
        assert image.mode == "RGB" and image.size == (6, 4)
    assert image.getpixel((0, 0)) != image.getpixel((5, 0)) or mode == "P"


def test_a_url_gives_the_pixels_of_the_file(tmp_path: Path, serve: Callable[..., str]) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    address = serve(
        {
            # what the server calls it does not matter, what it sends does
            "/picture?size=1": body(png(), Content_Type="text/plain"),
            "/moved": body(b"", 302, Location="/picture?size=1"),
        }
    )
    for url in (f"{address}/picture?size=1", f"{address}/moved", f"HTTP{address[4:]}/moved"):
        assert load_image(url).tobytes() == load_image(path).tobytes()


def test_a_server_that_answers_otherwise(serve: Callable[..., str]) -> None:
    address = serve(
        {
            "/none": body(b"gone", 404),
            "/page": body(b"<html>a cat</html>", Content_Type="image/png"),
            "/half": body(png()[:-30], Content_Length=str(len(png()))),
            "/empty": body(b""),
            "/file": body(b"", 302, Location="file:///etc/hostname"),
            "/ftp": body(b"", 302, Location="ftp://127.0.0.1/a.png"),
            "/round": body(b"", 302, Location="/round"),
            "/bomb": body(png_claiming(30_000, 30_000)),
        }
    )
    reasons = {
        "/none": "404",
        "/page": "not an image",
        "/half": "damaged or cut short",
        "/empty": "not an image",
        "/file": "file",
        "/ftp": "ftp",
        "/round": "cannot download",
        "/bomb": "too large",
    }
    for path, reason in reasons.items():
        with pytest.raises(UserInputError, match=reason) as refusal:
            load_image(address + path)
        assert "\n" not in str(refusal.value)


def test_limits_of_a_download(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve({"/large": body(bytes(200_000)), "/silent": silence, "/drip": drip})
    monkeypatch.setattr(images, "MAX_BYTES", 100_000)
    with pytest.raises(UserInputError, match="larger than"):
        load_image(f"{address}/large")
    monkeypatch.setattr(images, "SILENCE_SECONDS", 0.3)
    with pytest.raises(UserInputError, match=r"(?i)silent|timed out"):
        load_image(f"{address}/silent")
    monkeypatch.setattr(images, "SILENCE_SECONDS", 15.0)
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(UserInputError, match="within"):
        load_image(f"{address}/drip")


def test_a_format_that_pillow_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FORMATS", ("NEWER", *images.FORMATS))
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    assert load_image(path).size == (6, 4)


@pytest.mark.parametrize(
    "location",
    ["file:///etc/hostname", "ftp://example.com/a.png", "data:image/png;base64,AAAA", "s3://a/b"],
)
def test_other_schemes(location: str) -> None:
    with pytest.raises(UserInputError, match="is not supported; give a path or an http"):
        load_image(location)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:1/a.png", "http://127.0.0.1:x/a"])
def test_no_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserInputError, match="cannot download"):
        load_image(url)


def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    for side in (9_000, 9_500, 60_000):  # over our limit, over Pillow's first, over its second
        path = tmp_path / f"{side}.png"
        path.write_bytes(png_claiming(side, side))
        with pytest.raises(UserInputError, match="too large"):
            load_image(path)


def test_programs_disguised_as_pictures_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "picture.eps"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserInputError, match="not an image that can be read"):
        load_image(path)


def test_no_picture_on_disk(tmp_path: Path) -> None:
    half, no_pixels = tmp_path / "half.png", tmp_path / "zero.png"
    half.write_bytes(png()[:-30])
    no_pixels.write_bytes(png_claiming(0, 5))
    cases = {
        tmp_path / "nowhere.png": "no such file",
        "~nobody_of_this_name/a.png": "no such file",
        "a" * 5000: "no such file",
        tmp_path: "is not a file",
        Path("/dev/zero"): "is not a file",
        Path(__file__): "not an image",
        half: "damaged or cut short",
        no_pixels: "pixels|not an image",
    }
    for location, reason in cases.items():
        with pytest.raises(UserInputError, match=reason):
            load_image(location)
