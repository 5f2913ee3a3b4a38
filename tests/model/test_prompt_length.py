"""The length of a prompt, counted from shapes: what the model then reads, token by token."""

from collections.abc import Callable

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.families.contract import Picture
from llava.families.lengths import (
    PromptLength,
    answer_room,
    context_limits,
    describe_overflow,
    exceeded_limits,
    visual_room,
)
from llava.model.call_context import asking
from llava.model.loaded import LoadedModel
from llava.pruning import get_method, list_methods, prune

IMG = IMAGE_TOKEN_INDEX
IDS = torch.tensor([1, 5, IMG, 6, 7, IMG, 8])
SIZES = [(64, 48), (118, 31)]
SETTINGS = [
    None,
    {"method": "none"},
    {"method": "zoo", "keep_tokens": 9},
    {"method": "zoo", "keep_ratio": 0.3},
    {"method": "zoo", "keep_ratio": 1.0},
    {"method": "zoo", "keep_tokens": 12, "newline": "keep"},
    {"method": "divprune", "keep_ratio": 0.4, "allocation": "global", "newline": "select"},
    {"method": "zoo", "keep_tokens": 9, "positions": "original"},
    {"method": "random", "keep_tokens": 500},
    {"method": "zoo", "keep_tokens": 33, "scope": "prompt"},
    {"method": "zoo", "keep_ratio": 0.3, "scope": "prompt", "positions": "original"},
]
Make = Callable[..., object]


def read_by(model, ids: torch.Tensor, **images) -> tuple[int, int]:
    """(tokens, positions) of the prompt that the language model reads."""
    with torch.no_grad():
        _, positions, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            ids[None], None, torch.ones_like(ids)[None], None, None, **images
        )
    assert mask.all()
    count = embeds.shape[1]
    return count, count if positions is None else int(positions.max()) + 1


def prompt_length(model, ids: torch.Tensor, images, image_sizes=None, **how) -> PromptLength:
    """What the contract says of the same prompt."""
    sizes = image_sizes or [(28, 28)] * len(images)
    pictures = [Picture({"pixels": one}, size) for one, size in zip(images, sizes, strict=True)]
    return LoadedModel(model, None, None, "vicuna_v1").measure(ids, pictures, **how)


# The released code selects in every tile and knows no other way; what counts every image has no
# budget of a prompt.
CASES = [
    (pruning, protocol)
    for pruning in SETTINGS
    for protocol in ("native", "fixed2880", "zoo-release", "spatial")
    if (protocol != "zoo-release" or "newline" not in (pruning or {}))
    and (protocol in ("native", "fixed2880") or "scope" not in (pruning or {}))
]


@pytest.mark.parametrize(("pruning", "protocol"), CASES)
def test_tiled_images(pruning: dict | None, protocol: str, small_next: Make) -> None:
    model = small_next(mm_next_protocol=protocol)
    model.pruning = pruning
    images = [torch.randn(5, 3, 28, 28), torch.randn(4, 3, 28, 28)]
    given = {"images": images, "image_sizes": SIZES}
    if protocol == "fixed2880":  # crops of a 2 x 2 canvas
        given = {"images": [torch.randn(5, 3, 28, 28)] * 2, "image_sizes": SIZES}
    tokens, positions = read_by(model, IDS, **given)
    length = prompt_length(model, IDS, **given)
    assert length.text == 5
    if protocol == "zoo-release" and pruning and pruning["method"] != "none":
        assert tokens <= length.total  # what it keeps twice is known only then
    else:
        assert (length.total, length.positions) == (tokens, positions)


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("budget", [1, 3])
def test_images_of_one_tile(feature: str, budget: int, small_model: Make, pixels) -> None:
    model = small_model(mm_vision_select_feature=feature)
    images = pixels(2, side=28)
    assert prompt_length(model, IDS, images).total == read_by(model, IDS, images=images)[0]
    with prune(model, "grid" if feature == "patch" else "norm", keep_tokens=budget):
        assert prompt_length(model, IDS, images) == PromptLength(5, 2 * budget, 5 + 2 * budget)
        assert read_by(model, IDS, images=images) == (5 + 2 * budget, 5 + 2 * budget)


@pytest.mark.parametrize("method", [m for m in list_methods() if get_method(m).fixed_count])
def test_every_method_of_a_fixed_count(method: str, small_model: Make, pixels) -> None:
    model, images = small_model(), pixels(2, side=28)
    budget = {"keep_tokens": 2} if get_method(method).budgeted else {}
    model.text_tokenizer = lambda text, **_: {"input_ids": [5, 6]}
    with prune(model, method, **budget), asking(["what colour"]):
        tokens, _ = read_by(model, IDS, images=images)
        assert prompt_length(model, IDS, images).total == tokens


@pytest.mark.parametrize("limit", range(5, 18))
@pytest.mark.parametrize("budget", [None, 2, 4])
def test_what_gives_way_is_what_generate_drops(
    limit: int, budget: int | None, small_model: Make, pixels, caplog
) -> None:
    """A prompt exceeds the limit exactly where the model would cut it."""
    model, images = small_model(tokenizer_model_max_length=limit), pixels(2, side=28)
    model.pruning = None if budget is None else {"method": "zoo", "keep_tokens": budget}
    length = prompt_length(model, IDS, images, give_way=True)
    read, _ = read_by(model, IDS, images=images)
    cut = "tokens are cut off" in caplog.text
    limits = context_limits(model.config)
    assert bool(exceeded_limits(limits, length)) == cut and min(length.total, limit) == read
    asked = prompt_length(model, IDS, images)
    lost = cut or "visual tokens are dropped" in caplog.text
    assert bool(exceeded_limits(limits, asked)) == lost


def test_nothing_is_encoded(small_next: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_next()
    model.pruning = {"method": "zoo", "keep_tokens": 9}
    monkeypatch.setattr(type(model), "encode_images", lambda *_: pytest.fail("encoded"))
    images = [torch.zeros(5, 3, 28, 28), torch.zeros(4, 3, 28, 28)]
    assert prompt_length(model, IDS, images, SIZES).visual == 18


class Config:
    def __init__(self, longest: int | None, positions: int | None) -> None:
        self.tokenizer_model_max_length = longest
        self.max_position_embeddings = positions


@pytest.mark.parametrize(
    ("longest", "positions", "exceeded"),
    [
        (None, None, None),
        (100, 101, None),
        (99, 4096, "100, but tokenizer_model_max_length is 99"),
        (4096, 100, "at least 1 of the answer = 101, but max_position_embeddings is 100"),
        (98, 97, "but max_position_embeddings is 97"),
        (97, 98, "but tokenizer_model_max_length is 97"),
        (97, None, "but tokenizer_model_max_length is 97"),
    ],
)
def test_the_lowest_limit_is_named(
    longest: int | None, positions: int | None, exceeded: str | None
) -> None:
    known, length = context_limits(Config(longest, positions)), PromptLength(36, 64, 100)
    limits = exceeded_limits(known, length)
    if exceeded is None:
        assert not limits
        return
    said = describe_overflow(length, limits[0])
    assert said.startswith("36 tokens of text + 64 visual tokens ") and said.endswith(exceeded)


def test_rooms() -> None:
    length = PromptLength(36, 64, 600)
    assert answer_room(context_limits(Config(50, 1000)), length) == 400
    assert answer_room(context_limits(Config(50, None)), length) is None
    assert visual_room(context_limits(Config(50, 1000)), 36) == 14
    assert visual_room(context_limits(Config(100, 100)), 36) == 63
    assert visual_room(context_limits(Config(None, None)), 36) is None
    (limit,) = exceeded_limits(context_limits(Config(None, 600)), length)
    assert "+ 500 positions of removed tokens + at least 1" in describe_overflow(length, limit)
