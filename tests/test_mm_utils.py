"""Pixels, geometry and tokenisation equal LLaVA's."""

import base64
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from recorded_pixels import skip_unless_reproducible
from safetensors.torch import load_file
from test_images import png_claiming
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.anyres import select_filled_resolution
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
    unpad_image,
)
from llava.utils import UserInputError

FOLDER = Path(__file__).parent / "goldens" / "llava"
MEAN = (122, 116, 104)


def _read(name: str) -> list:
    return json.loads((FOLDER / "geometry" / name).read_text())


GEOMETRY = json.loads((FOLDER / "geometry" / "case.json").read_text())
PIXELS = json.loads((FOLDER / "pixels" / "case.json").read_text())
JOBS = PIXELS["jobs"]


def _content_box(image: Image.Image, background: tuple[int, ...]) -> list[int]:
    differs = (np.asarray(image) != np.array(background)).any(axis=-1)
    rows, cols = np.nonzero(differs.any(1))[0], np.nonzero(differs.any(0))[0]
    return [int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])]


def test_resolutions() -> None:
    pinpoints, second = GEOMETRY["pinpoints"], GEOMETRY["pinpoints_set2"]
    entries = _read("resolutions.json")
    assert len(entries) == GEOMETRY["files"]["resolutions.json"]
    for entry in entries:
        size = tuple(entry["size_wh"])
        assert list(select_best_resolution(size, pinpoints)) == entry["best_resolution"]
        assert list(select_best_resolution(size, second)) == entry["best_resolution_set2"]
        grid = get_anyres_image_grid_shape(size, pinpoints, 336)
        assert list(grid) == entry["grid_wh_336"]
        from_text = get_anyres_image_grid_shape(size, str(pinpoints), 336)
        assert list(from_text) == entry["grid_from_string"]
        tokens = entry["visual_tokens_16"]
        tiles = torch.zeros(1, 24 * grid[1], 24 * grid[0])
        rows, cols = unpad_image(tiles, size).shape[1:]
        assert [rows, cols] == tokens["unpadded_hw"]
        assert 576 + rows * (cols + 1) == tokens["tokens"]


def test_no_resolution_to_choose_from() -> None:
    with pytest.raises(UserInputError, match="image_grid_pinpoints is empty"):
        select_best_resolution((10, 10), [])


def test_expand_to_square() -> None:
    for entry in _read("expand2square.json"):
        image = Image.new("RGB", tuple(entry["size_wh"]), (255, 0, 0))
        square = expand2square(image, MEAN)
        assert list(square.size) == entry["result_wh"]
        assert _content_box(square, MEAN) == entry["content_box_xyxy_inclusive"]
        colours = {colour for _, colour in square.getcolors()} - {(255, 0, 0)}
        assert colours == {tuple(colour) for colour in entry["background"]}


def test_square_image_is_not_copied() -> None:
    image = Image.new("RGB", (5, 5))
    assert expand2square(image, MEAN) is image


def test_resize_and_pad() -> None:
    for entry in _read("resize_and_pad.json"):
        image = Image.new("RGB", tuple(entry["size_wh"]), (255, 255, 255))
        target = tuple(entry["target_wh"])
        fitted = resize_and_pad_image(image, target)
        assert fitted.size == target
        assert _content_box(fitted, (0, 0, 0)) == entry["content_box_xyxy_inclusive"]
        assert len(divide_to_patches(fitted, 336)) == entry["n_patches_336"]


def test_patches_come_row_by_row() -> None:
    image = Image.new("RGB", (4, 2))
    for x in range(4):
        for y in range(2):
            image.putpixel((x, y), (x, y, 0))
    corners = [patch.getpixel((0, 0))[:2] for patch in divide_to_patches(image, 1)]
    assert corners == [(x, y) for y in range(2) for x in range(4)]


def test_unpad() -> None:
    for entry in _read("unpad.json"):
        height, width = entry["tensor_hw"]
        tensor = torch.arange(height * width).view(1, height, width)
        result = unpad_image(tensor, tuple(entry["original_wh"]))
        assert list(result.shape[1:]) == entry["result_hw"]
        flat = result.flatten().tolist()
        ends = [flat[0], flat[-1]] if flat else None
        assert ends == entry["first_last_flat_index"]


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil.from_pretrained(FOLDER / "checkpoints" / "clip-tiny-patch14-336")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["key"])
def test_pixels(job: dict, processor: CLIPImageProcessorPil, record_error) -> None:
    skip_unless_reproducible([job["file"]], in_tiles=job["image_aspect_ratio"] == "anyres")
    image = Image.open(FOLDER / job["file"]).convert("RGB")
    config = SimpleNamespace(
        image_aspect_ratio=job["image_aspect_ratio"],
        image_grid_pinpoints=PIXELS["image_grid_pinpoints"],
    )
    pixels = process_images([image], processor, config)
    assert list(pixels.shape) == job["process_images_result_shape"]
    views = pixels.view(-1, 3, 336, 336)

    mean = np.array(processor.image_mean)
    std = np.array(processor.image_std)
    stacked = views.permute(0, 2, 3, 1).flatten(0, 1)
    levels = np.rint((stacked.numpy() * std + mean) * 255)
    wanted = np.asarray(Image.open(FOLDER / "pixels" / job["views_png"]).convert("RGB"))
    off = np.abs(levels - wanted)
    # Another Pillow may round a few pixels differently by one level.
    assert off.max() <= 1 and (off > 0).mean() < 1e-3
    record_error("pixels: levels of 255", off.max())

    samples = load_file(FOLDER / "pixels" / "samples.safetensors")[job["key"] + "__sample"]
    error = (views[..., ::24, ::24] - samples).abs().max().item()
    if off.max() == 0:
        assert error <= 1e-6
    record_error("pixels: normalised samples", error)


def test_images_of_any_mode_and_size_are_taken(processor: CLIPImageProcessorPil) -> None:
    images = [Image.new("L", (40, 30)), Image.new("RGBA", (20, 90)), Image.new("P", (64, 64))]
    for aspect in ("pad", None, "square"):
        pixels = process_images(images, processor, SimpleNamespace(image_aspect_ratio=aspect))
        assert pixels.shape == (3, 3, 336, 336)


def test_the_canvas_that_is_filled_best() -> None:
    """41 x 29 fills 672 x 336 and 672 x 672 alike, to a whole pixel: the smaller one wins."""
    grids = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    for size, canvas in (
        *(((1009, 673), (672, 336)), ((672, 672), (672, 672)), ((41, 29), (672, 336))),
        *(((1180, 310), (1008, 336)), ((29, 41), (336, 672)), ((10, 900), (336, 1008))),
    ):
        assert select_filled_resolution(size, grids) == canvas
    with pytest.raises(UserInputError, match="image_grid_pinpoints is empty"):
        select_filled_resolution((10, 10), [])


def _anyres(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio="anyres", **settings)


def test_anyres_tiles(processor: CLIPImageProcessorPil) -> None:
    wide, square = Image.new("RGB", (900, 200)), Image.new("L", (500, 500))
    pixels = process_images([wide, square], processor, _anyres())
    assert [tuple(tiles.shape) for tiles in pixels] == [(4, 3, 336, 336), (5, 3, 336, 336)]
    assert process_images([wide, wide], processor, _anyres()).shape == (2, 4, 3, 336, 336)
    as_text = _anyres(image_grid_pinpoints="[(336, 672), (672, 336)]")
    assert process_images([wide], processor, as_text).shape == (1, 3, 3, 336, 336)
    fixed = _anyres(mm_next_protocol="fixed2880")
    assert process_images([wide, square], processor, fixed).shape == (2, 5, 3, 336, 336)
    photo, native = Image.new("RGB", (1009, 673)), _anyres(mm_next_protocol="spatial")
    assert process_images([photo], processor, native).shape == (1, 5, 3, 336, 336)
    filled = _anyres(mm_next_protocol="spatial-filled")
    assert process_images([photo], processor, filled).shape == (1, 3, 3, 336, 336)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "models after LLaVA-1.6"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is"),
        ({"image_grid_pinpoints": "[(336,"}, "image_grid_pinpoints is"),
        ({"image_grid_pinpoints": [[336, 400]]}, "not multiples of the vision tower's 336"),
        ({"mm_next_protocol": "fixed"}, "use one of native, fixed2880, zoo-release"),
        ({"mm_next_protocol": "fixed2880", "image_aspect_ratio": "pad"}, "use 'native'"),
    ],
)
def test_unusable_tiles(settings, message: str, processor: CLIPImageProcessorPil) -> None:
    config = SimpleNamespace(**{"image_aspect_ratio": "anyres", **settings})
    with pytest.raises(UserInputError, match=message):
        process_images([Image.new("RGB", (8, 8))], processor, config)


@pytest.mark.parametrize("size", [(100_000, 10), (2, 100_000)])
@pytest.mark.parametrize("aspect", ["pad", "square", "anyres"])
def test_strips_do_not_fill_the_memory(
    size: tuple[int, int], aspect: str, processor: CLIPImageProcessorPil
) -> None:
    """Their square has 10,000 million pixels; LLaVA-1.6 cuts its tiles from a small canvas."""
    config = SimpleNamespace(image_aspect_ratio=aspect)
    strip = [Image.new("RGB", size)]
    if aspect == "anyres":
        assert process_images(strip, processor, config).shape[-3] == 3
    else:
        with pytest.raises(UserInputError, match=f"{size[0]} x {size[1]} pixels is too long"):
            process_images(strip, processor, config)


def test_base64_images() -> None:
    buffer = BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, format="PNG")
    assert load_image_from_base64(base64.b64encode(buffer.getvalue()).decode()).size == (3, 2)
    with pytest.raises(UserInputError, match="the image is not an image that can be read"):
        load_image_from_base64(base64.b64encode(b"no image").decode())
    with pytest.raises(UserInputError, match=r"the image is .*bomb"):
        load_image_from_base64(base64.b64encode(png_claiming(60_000, 60_000)).decode())


class WordTokenizer:
    """Words to ids 10, 11, ...; writes BOS like a Llama tokenizer."""

    def __init__(self, bos: int | None = 1) -> None:
        self.bos_token_id = bos
        self.words: list[str] = []

    def __call__(self, text: str) -> SimpleNamespace:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        ids = [10 + self.words.index(word) for word in text.split()]
        return SimpleNamespace(input_ids=ids if self.bos_token_id is None else [1, *ids])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[i - 10] for i in ids if i >= 10)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a b", [1, 10, 11]),
        ("a <image> b", [1, 10, -200, 11]),
        ("<image> a", [1, -200, 10]),
        ("a <image><image>", [1, 10, -200, -200]),
        ("", [1]),
    ],
)
def test_prompt_tokens(prompt: str, ids: list[int]) -> None:
    assert tokenizer_image_token(prompt, WordTokenizer()) == ids
    assert tokenizer_image_token(prompt, WordTokenizer(bos=None)) == ids[1:]
    tensor = tokenizer_image_token(prompt, WordTokenizer(), return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.tolist() == ids


def test_other_tensor_types_are_refused() -> None:
    with pytest.raises(ValueError, match="unsupported tensor type"):
        tokenizer_image_token("a", WordTokenizer(), return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/data/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("runs/mine/checkpoint-500", "mine_checkpoint-500"),
        ("checkpoint-5", "checkpoint-5"),
    ],
)
def test_model_name(path: str, name: str) -> None:
    assert get_model_name_from_path(path) == name


def test_keywords_stop_with_and_without_the_prompt_in_the_sequence() -> None:
    tokenizer = WordTokenizer()
    prompt = torch.tensor([[1, *tokenizer("say stop").input_ids[1:]]])
    stop = KeywordsStoppingCriteria(["stop"], tokenizer, prompt)
    word, end = 10, 11
    assert not stop(prompt, None)
    assert not stop(torch.tensor([[*prompt[0].tolist(), word]]), None)
    assert stop(torch.tensor([[*prompt[0].tolist(), word, end]]), None)
    assert not stop(torch.tensor([[word]]), None)
    assert stop(torch.tensor([[word, end]]), None)
    assert not stop(torch.tensor([[word, end], [word, word]]), None)
