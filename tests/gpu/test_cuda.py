"""The same answers on a GPU: every method, autocast, batches, threads, and llava-tiny's answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pruning_inputs import one_tile, visual_for
from torch import Tensor

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import (
    PruningConfig,
    PruningError,
    VisualTokens,
    get_method,
    list_methods,
    prune,
    prune_visual_tokens,
)
from llava.pruning.tokens import TILE_EXTRAS

pytestmark = pytest.mark.gpu

TINY = Path(__file__).resolve().parents[2] / "playground" / "llava-tiny"
METHODS = [name for name in list_methods() if get_method(name).budgeted]
each_method = pytest.mark.parametrize("name", METHODS)
LARGE = (24, 24)


def on_gpu(value: Any) -> Any:
    """Visual tokens, and everything in them, on the GPU."""
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, list):
        return [on_gpu(part) for part in value]
    if isinstance(value, VisualTokens):
        return replace(
            value,
            features=value.features.cuda(),
            projected=value.projected.cuda(),
            projector=value.projector.cuda(),
            valid=None if value.valid is None else value.valid.cuda(),
            newline=None if value.newline is None else value.newline.cuda(),
            extras={key: on_gpu(extra) for key, extra in value.extras.items()},
        )
    return value


@each_method
def test_the_gpu_keeps_what_the_cpu_keeps(name: str) -> None:
    """In float64, where rounding decides nothing."""
    config = PruningConfig(name, keep_tokens=9)
    want = prune_visual_tokens(visual_for(name, dtype=torch.float64), config)
    got = prune_visual_tokens(on_gpu(visual_for(name, dtype=torch.float64)), config)
    assert got.projected.is_cuda
    torch.testing.assert_close(got.projected.cpu(), want.projected)
    if want.kept is not None:
        assert torch.equal(got.kept.cpu(), want.kept)


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_on_the_gpu_changes_nothing(name: str, dtype: torch.dtype) -> None:
    config = PruningConfig(name, keep_tokens=64)
    visual = on_gpu(visual_for(name, 1, grid=LARGE))
    want = prune_visual_tokens(visual, config)
    with torch.autocast("cuda", dtype=dtype):
        got = prune_visual_tokens(visual, config)
    assert torch.equal(got.projected, want.projected)


@each_method
def test_a_row_alone_and_in_a_batch(name: str) -> None:
    """Bit-identical tokens give identical picks (DESIGN promise 3)."""
    config = PruningConfig(name, keep_tokens=64)
    visual = on_gpu(visual_for(name, 3, grid=LARGE))
    if visual.extras.keys() - set(TILE_EXTRAS):
        pytest.skip("every image has a question of its own, which the batch would renumber")
    together = prune_visual_tokens(visual, config)
    for tile in range(3):
        alone = prune_visual_tokens(one_tile(visual, tile), config)
        assert torch.equal(alone.embeddings(0), together.embeddings(tile))


@each_method
def test_nan_is_refused(name: str) -> None:
    visual = on_gpu(visual_for(name))
    visual.projected[0, 3, 0] = torch.nan
    visual.features[0, 3, 0] = torch.nan
    with pytest.raises(PruningError, match="NaN or inf"):
        prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9)).settle()


class Tiny:
    """llava-tiny on a device, asked about the images of its own test set."""

    def __init__(self, device: str, **loading: Any) -> None:
        self.tokenizer, self.model, processor, _ = load_pretrained_model(
            str(TINY), device=device, **loading
        )
        picture = Image.open(TINY / "example.png").convert("RGB")
        turned = [picture.rotate(angle) for angle in (0, 90, 180, 270)]
        self.pixels = [
            process_images([image], processor, self.model.config).to(
                self.model.device, self.model.dtype
            )
            for image in turned
        ]

    def answer(self, method: str | None, image: int, question: str) -> list[int]:
        text = f"USER: <image>\n{question} ASSISTANT:"
        ids = tokenizer_image_token(text, self.tokenizer, return_tensors="pt")[None]
        block = prune(self.model, method, keep_tokens=64) if method else nullcontext()
        with block:
            new = self.model.generate(
                ids.to(self.model.device),
                images=self.pixels[image],
                questions=[question],
                do_sample=False,
                max_new_tokens=4,
            )
        return new[0].tolist()


def cases() -> list[tuple[str | None, int, str]]:
    lines = (TINY / "benchmark" / "questions.jsonl").read_text().splitlines()[:6]
    questions = [json.loads(line)["text"] for line in lines]
    methods = [None, *METHODS]
    return [
        (method, number % 4, questions[(number + shift) % 6])
        for number, method in enumerate(methods)
        for shift in range(2)
        if method is None or "clip_text" not in get_method(method).needs
    ]


@pytest.fixture(scope="module")
def on_cpu() -> list[list[int]]:
    tiny = Tiny("cpu")
    return [tiny.answer(*case) for case in cases()]


def test_llava_tiny_answers_as_on_the_cpu(on_cpu: list[list[int]]) -> None:
    tiny = Tiny("cuda", dtype=torch.float32)
    answers = [tiny.answer(*case) for case in cases()]
    same = sum(map(list.__eq__, answers, on_cpu))
    assert same >= len(on_cpu) - 1, f"{same} of {len(on_cpu)} answers are equal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_llava_tiny_in_half_precision(on_cpu: list[list[int]], dtype: torch.dtype) -> None:
    """Most answers stay: half precision moves features, so close picks may change."""
    tiny = Tiny("cuda", dtype=dtype)
    answers = [tiny.answer(*case) for case in cases()]
    same = sum(map(list.__eq__, answers, on_cpu))
    assert same >= 0.8 * len(on_cpu), f"{same} of {len(on_cpu)} answers are equal"


def test_threads_on_one_gpu() -> None:
    tiny = Tiny("auto")
    assert tiny.model.device.type == "cuda"
    assert tiny.model.dtype == torch.float16
    todo = cases()
    alone = [tiny.answer(*case) for case in todo]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: tiny.answer(*case), todo)) == alone
