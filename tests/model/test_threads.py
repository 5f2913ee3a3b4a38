"""Threads that share one model get exactly the answers they get alone."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageOps

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.call_context import call_context, steps_run_by
from llava.pruning import PruningConfig, prune
from llava.serve.turn import PipelineClock

TINY = Path(__file__).resolve().parents[2] / "playground" / "llava-tiny"
THREADS = 4
METHODS = (None, "zoo", "visionzip", "mmtok")
BUDGETS = {None: (None,), "zoo": (192, 48), "visionzip": (128, 33), "mmtok": (64, 20)}
QUESTIONS = ("What color is the ring?", "How many things are there?", "Is there a star?")


class Request(NamedTuple):
    """What one caller asks: method and budget, image, question."""

    method: str | None
    keep: int | None
    image: int
    question: int


REQUESTS = [
    Request(method, keep, image, (image + number) % len(QUESTIONS))
    for number, (method, image) in enumerate(itertools.product(METHODS, range(3)))
    for keep in BUDGETS[method]
]


class World(NamedTuple):
    model: Any
    tokenizer: Any
    pixels: list[torch.Tensor]

    def prompt(self, question: str) -> torch.Tensor:
        """Ids [1, L] of a question about an image."""
        chat = conv_templates["v1"].copy()
        chat.append_message(chat.roles[0], f"<image>\n{question}")
        chat.append_message(chat.roles[1], None)
        return tokenizer_image_token(chat.get_prompt(), self.tokenizer, return_tensors="pt")[None]

    def generate(self, image: int, question: int, **settings: Any) -> torch.Tensor:
        """First tokens and their logits: equal ids alone could hide another prompt."""
        found = self.model.generate(
            self.prompt(QUESTIONS[question]),
            images=self.pixels[image],
            questions=[QUESTIONS[question]],
            do_sample=False,
            max_new_tokens=3,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        return torch.cat([found.sequences.float(), *found.logits], dim=1)

    def answer(self, request: Request) -> torch.Tensor:
        with (
            nullcontext()
            if request.method is None
            else prune(self.model, request.method, keep_tokens=request.keep)
        ):
            return self.generate(request.image, request.question)


@pytest.fixture(scope="module")
def world() -> World:
    tokenizer, model, processor, _ = load_pretrained_model(str(TINY), device="cpu")
    picture = Image.open(TINY / "example.png").convert("RGB")
    pictures = [picture, ImageOps.mirror(picture), ImageOps.invert(picture)]
    pixels = [process_images([image], processor, model.config) for image in pictures]
    return World(model, tokenizer, pixels)


@pytest.fixture(scope="module")
def alone(world: World) -> dict[Request, torch.Tensor]:
    answers = {request: world.answer(request) for request in REQUESTS}
    # Requests differ, so that an answer given to the wrong caller shows.
    for one, other in itertools.combinations(answers.values(), 2):
        assert not torch.equal(one, other)
    return answers


@pytest.mark.timeout(120)
def test_threads_get_the_answers_they_get_alone(
    world: World, alone: dict[Request, torch.Tensor]
) -> None:
    start = threading.Barrier(THREADS)

    def serve(number: int) -> list[Request]:
        start.wait(30)
        own = REQUESTS[number:] + REQUESTS[:number]  # neighbours run different methods
        return [r for r in own[:: 1 + number % 2] if not torch.equal(world.answer(r), alone[r])]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [r for found in pool.map(serve, range(0, 5 * THREADS, 5)) for r in found]
    assert wrong == []
    assert world.model.pruning is None


@pytest.mark.timeout(120)
def test_an_event_loop_with_an_executor(world: World, alone: dict[Request, torch.Tensor]) -> None:
    async def serve(request: Request) -> bool:
        return torch.equal(await asyncio.to_thread(world.answer, request), alone[request])

    async def together() -> list[bool]:
        return await asyncio.gather(*map(serve, REQUESTS[::2]))

    assert all(asyncio.run(together()))


def test_tasks_of_one_thread_have_settings_of_their_own(world: World) -> None:
    async def hold(config: PruningConfig | None) -> bool:
        with prune(world.model, config):
            for _ in range(3):
                await asyncio.sleep(0)
                if world.model.pruning != config:
                    return False
        return world.model.pruning is None

    async def together() -> list[bool]:
        configs = [PruningConfig("zoo", keep_tokens=k) for k in (8, 16)]
        return await asyncio.gather(*map(hold, [None, *configs]))

    assert asyncio.run(together()) == [True] * 3


def test_a_call_has_one_setting_whatever_others_set_meanwhile(
    world: World, alone: dict[Request, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default changes between encoding and pruning: the call goes on as it began."""
    model, own = world.model, world.model.encode_visual_tokens
    request = next(r for r in REQUESTS if r.method == "visionzip")

    def encode(*args: Any, **kwargs: Any) -> Any:
        visual = own(*args, **kwargs)
        model.pruning = PruningConfig("grid", keep_tokens=4)
        return visual

    monkeypatch.setattr(model, "encode_visual_tokens", encode)
    try:
        model.pruning = PruningConfig("visionzip", keep_tokens=request.keep)
        found = world.generate(request.image, request.question)
    finally:
        model.pruning = None
    assert torch.equal(found, alone[request])


def test_clocks_time_their_own_call(world: World) -> None:
    """Two chats on one model: each clock sees its own call, and nothing is set on the model."""
    inside, go_on = threading.Event(), threading.Event()
    clocks = {name: PipelineClock(torch.device("cpu")) for name in ("slow", "fast")}

    def slow(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return clocks["slow"].run(name, step, *arguments)

    def ask(runner: Callable[..., Any], keep: int) -> None:
        with steps_run_by(runner), prune(world.model, "grid", keep_tokens=keep):
            world.generate(0, 0)

    before = dict(vars(world.model))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, slow, 16)
        assert inside.wait(30)
        assert vars(world.model).keys() == before.keys()
        ask(clocks["fast"].run, 64)
        go_on.set()
        waiting.result(30)
    seen = {name: clock.tokens["prune"].embeddings(0).shape[0] for name, clock in clocks.items()}
    assert seen == {"slow": 16, "fast": 64}
    assert vars(world.model).keys() == before.keys()


def test_strict_rows_have_one_setting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread changes the default after the first row: the second goes on as it began."""
    model, own, seen = world.model, world.model.prune_visual_tokens, []

    def watched(visual: Any) -> Any:
        seen.append(model.pruning)
        model.pruning = PruningConfig("grid", keep_tokens=4)
        return own(visual)

    monkeypatch.setattr(model, "prune_visual_tokens", watched)
    ids = torch.cat([world.prompt(QUESTIONS[0])] * 2)
    try:
        model.pruning = begun = PruningConfig("grid", keep_tokens=16)
        model.generate(ids, images=torch.cat(world.pixels[:2]), strict=True, max_new_tokens=1)
    finally:
        model.pruning = None
    assert seen == [begun, begun]


def test_a_clock_stops_with_its_block() -> None:
    before = call_context().run_step
    with pytest.raises(KeyError), steps_run_by(PipelineClock(torch.device("cpu")).run):
        assert call_context().run_step is not before
        raise KeyError
    assert call_context().run_step is before


def test_no_hook_is_registered_while_encoding(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks of a shared module would see the calls of other threads."""
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_pre_hook", lambda *_, **__: pytest.fail("a hook")
    )
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_hook", lambda *_, **__: pytest.fail("a hook")
    )
    for method in METHODS[1:]:
        world.answer(Request(method, 24, 0, 0))


def test_features_are_those_the_projector_was_given(world: World) -> None:
    """Also where encode_images is replaced, as forks do."""
    model, pixels = world.model, world.pixels[0]
    with torch.no_grad():
        visual = model.encode_visual_tokens(pixels)
        assert torch.equal(visual.projected, model.get_model().mm_projector(visual.features))
    own = model.encode_images
    model.encode_images = lambda images: own(images.clone())
    try:
        assert torch.equal(model.encode_visual_tokens(pixels).features, visual.features)
        model.encode_images = lambda images: own(images).mean(dim=1, keepdim=True)
        with pytest.raises(ValueError, match="run the model's tower once over its images"):
            model.encode_visual_tokens(pixels)
    finally:
        del model.encode_images


def test_autocast_around_generate(world: World) -> None:
    """The tower and the language model run in bfloat16; the stage reads them and stays exact."""
    for method in METHODS[1:]:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            prune(world.model, method, keep_tokens=64),
        ):
            visual = world.model.encode_visual_tokens(world.pixels[0])
            visual = world.model.with_questions(visual, [QUESTIONS[0]])
            inside = world.model.prune_visual_tokens(visual)
            assert world.generate(0, 0).shape[1] > 3
        with prune(world.model, method, keep_tokens=64):
            outside = world.model.prune_visual_tokens(visual)
        assert torch.equal(inside.projected, outside.projected)
