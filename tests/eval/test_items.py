"""Items of any shape: none, one or several images, tiles, images that cannot be read.

The loop must give what `model.generate` gives for the same prompt, whatever stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import draw_picture

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.engine.batches import Plan
from llava.eval.engine.decode import row_seed
from llava.eval.engine.request import Arm, parse_arm
from llava.eval.engine.runner import Runner
from llava.eval.prompts import question
from llava.eval.tasks.base import Benchmark, Item, TaskError
from llava.families.spec import ModelSpec
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.loaded import LoadedModel
from llava.model.prompting import render
from llava.pruning import prune
from llava.sampling import Sampling
from llava.utils import UserInputError

GREEDY = Sampling(temperature=0, max_new_tokens=5)
SHAPES = (("a",), (), ("b", "a"), ("b",), ("c", "a", "b"), ("a",))
SETTINGS = ("none", "random@48", "zoo-exact@48", "mmtok@48", "grid@0.1", "norm:scope=prompt@48")
ARMS = tuple(map(parse_arm, SETTINGS))


class Pictures(Benchmark):
    """Six questions about three drawn pictures."""

    name = "pictures"
    title = "pictures"
    protocols = {"llava": ""}  # noqa: RUF012
    max_new_tokens = 5
    headline = ""

    def __init__(
        self,
        broken: Sequence[str] = (),
        wrong: Sequence[str] = (),
        strips: Sequence[str] = (),
    ) -> None:
        super().__init__(Path())
        self.broken, self.wrong, self.strips = broken, wrong, strips

    def items(self) -> list[Item]:
        return [
            Item(i, f"q{i}", images, f"What colour is circle {i}?", f"colour circle {i}")
            for i, images in enumerate(SHAPES)
        ]

    def load_image(self, name: str) -> Image.Image:
        if name in self.broken:
            raise UserInputError(f"image {name} is damaged")
        if name in self.wrong:
            raise TaskError("these are other pictures")
        if name in self.strips:
            return Image.new("RGB", (20000, 2))
        return draw_picture(ord(name)).resize(
            {"a": (336, 336), "b": (500, 300)}.get(name, (90, 400))
        )

    def data_hash(self) -> str:
        return ""

    def item_score(self, item: Item, answer: str) -> float:
        return float(bool(answer))

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict:
        return {}


@pytest.fixture
def tiles(checkpoint: Path) -> LoadedModel:
    """The same weights as a LLaVA-1.6: images in tiles, lines that end in newlines."""
    subject = ModelSpec(str(checkpoint), device="cpu").load()
    model = subject.model
    model.config.image_aspect_ratio = "anyres"
    model.config.mm_patch_merge_type = "spatial_unpad"
    model.config.image_grid_pinpoints = [[336, 672], [672, 336]]
    generator = torch.Generator().manual_seed(0)
    newline = torch.randn(model.config.hidden_size, generator=generator)
    model.get_model().image_newline = torch.nn.Parameter(newline)
    return subject


def runner_of(
    subject: LoadedModel, benchmark: Benchmark, batch_size: int = 6, **settings
) -> Runner:
    settings = {"sampling": GREEDY, "seed": 3} | settings
    return Runner(subject, benchmark, Plan.of(benchmark.items(), batch_size), **settings)


def answers_of(runner: Runner, arms: Sequence[Arm]) -> dict[tuple[str, int], dict]:
    records = [record for answers, _ in runner.run(arms) for record in answers]
    return {(record["arm"], record["index"]): record for record in records}


def generated(subject: LoadedModel, item: Item, arm: Arm, sampling: Sampling = GREEDY) -> str:
    """The answer of `model.generate` to one prompt."""
    model = subject.model
    images = [Pictures().load_image(name) for name in item.images]
    prompt = render(question(item.text, len(images)), subject.template, model.config)
    ids = tokenizer_image_token(prompt, subject.tokenizer, return_tensors="pt")[None]
    with prune(model, arm.seeded(3)):
        output = model.generate(
            inputs=ids,
            images=process_images(images, subject.image_processor, model.config)
            if images
            else None,
            image_sizes=[image.size for image in images],
            questions=[item.question],
            **sampling.arguments(),
        )
    return subject.tokenizer.decode(output[0], skip_special_tokens=True).strip()


def check_as_generated(subject: LoadedModel, batch_size: int) -> None:
    runner = runner_of(subject, Pictures(), batch_size)
    records = answers_of(runner, ARMS)
    assert len(records) == len(ARMS) * len(SHAPES)
    for arm in ARMS:
        for item in runner.plan.items:
            said = records[arm.name, item.index]["answer"]
            assert said == generated(subject, item, arm), (arm.name, item.index)
    assert len({record["answer"] for record in records.values()}) > len(SHAPES)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_any_number_of_images(subject: LoadedModel, batch_size: int) -> None:
    check_as_generated(subject, batch_size)
    tokens = {
        (record["arm"], len(record["images"])): record["tokens_in"]
        for record in answers_of(runner_of(subject, Pictures(), batch_size), ARMS).values()
    }
    assert [tokens["none", count] for count in range(4)] == [0, 576, 1152, 1728]
    assert [tokens["random@48", count] for count in range(4)] == [0, 48, 96, 144]
    assert tokens["grid@0.1", 1] == 58
    assert [tokens["norm:scope=prompt@48", count] for count in range(4)] == [0, 48, 48, 48]


def test_tiles(tiles: LoadedModel) -> None:
    check_as_generated(tiles, batch_size=4)


def test_prompts_without_room_for_their_images(subject: LoadedModel) -> None:
    """Where a prompt is too long for the model, its images share what room there is."""
    subject.model.config.tokenizer_model_max_length = 260  # of which about 160 are text
    try:
        arm = parse_arm("zoo-exact@48")
        runner = runner_of(subject, Pictures())
        records = answers_of(runner, [arm])
        three = runner.plan.items[4]
        assert 48 < records[arm.name, 4]["tokens_in"] < 3 * 48
        for item in (runner.plan.items[0], three):
            assert records[arm.name, item.index]["answer"] == generated(subject, item, arm)
        cut = answers_of(runner, ARMS[:1])["none", 4]["tokens_in"]
        (ids,) = runner.prompts([three], [3])
        assert cut == 260 - ids.tolist().index(IMAGE_TOKEN_INDEX), "the rest was cut off"
    finally:
        del subject.model.config.tokenizer_model_max_length


def test_controls_show_other_images_or_none(subject: LoadedModel) -> None:
    runner = runner_of(subject, Pictures())
    arms = [Arm("other", image="other"), Arm("absent", image="absent")]
    records = answers_of(runner, arms)
    assert records["other", 2]["images"] == ["b", "a"]
    assert (
        set(records["other", 2]["shown"]).isdisjoint(["x"])
        and len(records["other", 2]["shown"]) == 2
    )
    for own, shown in zip(records["other", 2]["images"], records["other", 2]["shown"], strict=True):
        assert own != shown
    assert [records["absent", i]["tokens_in"] for i in range(6)] == [0] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_fails_its_items_alone(subject: LoadedModel, workers: int) -> None:
    whole = answers_of(runner_of(subject, Pictures()), ARMS[:2])
    broken = answers_of(
        runner_of(subject, Pictures(broken=["c"]), batch_size=2, workers=workers), ARMS[:2]
    )
    assert broken.keys() == whole.keys()
    for (arm, index), record in broken.items():
        if index == 4:
            assert record["error"] == "image c is damaged"
            assert (record["answer"], record["score"]) == ("", None)
        else:
            assert "error" not in record
            assert record["kept"] == whole[arm, index]["kept"]
    nothing = answers_of(runner_of(subject, Pictures(broken="abc")), ARMS[:2])
    assert [i for (arm, i), record in nothing.items() if "error" not in record] == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_no_model_can_be_shown_fails_alone(subject: LoadedModel, workers: int) -> None:
    pictures = Pictures(strips=["c"])
    records = answers_of(runner_of(subject, pictures, batch_size=2, workers=workers), ARMS[:1])
    failed = {index: record["error"] for (_, index), record in records.items() if "error" in record}
    assert failed.keys() == {4}
    assert re.search(r"^image c: a picture of 20000 x 2 pixels is too long", failed[4])


@pytest.mark.parametrize("workers", [0, 1])
def test_other_data_end_the_run(subject: LoadedModel, workers: int) -> None:
    runner = runner_of(subject, Pictures(wrong=["b"]), batch_size=1, workers=workers)
    with pytest.raises(TaskError, match=r"^these are other pictures$"):
        answers_of(runner, ARMS[:1])


def test_draws_depend_on_nothing_but_the_seed(subject: LoadedModel) -> None:
    """Sampled answers are those of `generate` under the row's seed, in any batch and any order."""
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=5)
    arm = ARMS[1]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    together = answers_of(runner_of(subject, Pictures(), 6, sampling=sampling), [arm])
    alone = answers_of(runner_of(subject, Pictures(), 1, sampling=sampling), [arm])
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: r["answer"] for k, r in together.items()} == {
        k: r["answer"] for k, r in alone.items()
    }
    greedy = answers_of(runner_of(subject, Pictures(), 6), [arm])
    other = answers_of(runner_of(subject, Pictures(), 6, sampling=sampling, seed=4), [arm])
    for answers in (greedy, other):
        assert any(record["answer"] != answers[key]["answer"] for key, record in together.items())
    for item in Pictures().items()[:3]:
        torch.manual_seed(row_seed(3, item.index))
        assert together[arm.name, item.index]["answer"] == generated(subject, item, arm, sampling)


def test_beams_are_those_of_generate(subject: LoadedModel) -> None:
    sampling = Sampling(temperature=0, num_beams=3, max_new_tokens=5)
    records = answers_of(runner_of(subject, Pictures(), sampling=sampling), ARMS[:1])
    for item in Pictures().items():
        assert records["none", item.index]["answer"] == generated(subject, item, ARMS[0], sampling)


def test_workers_change_nothing(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(batch_size=2)
    plain = answers_of(runner, ARMS[:2])
    runner.workers = 2
    state = torch.get_rng_state()
    assert answers_of(runner, ARMS[:2]) == plain
    assert torch.equal(torch.get_rng_state(), state)
