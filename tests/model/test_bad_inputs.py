"""Inputs that no model can read: each gives one UserInputError that names cause and remedy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.checks import all_finite, check_sizes
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
Make = Callable[..., LlavaLlamaForCausalLM]
IDS = torch.tensor([[1, IMG, 5], [1, 7, IMG]])
GREEDY = {"do_sample": False, "max_new_tokens": 2}


def _pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*(shape or (2, 3, 28, 28)), generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one number for sizes": ({"image_sizes": 640}, r"image_sizes must be a list .*got 640; give"),
    "text for sizes": ({"image_sizes": "640x480"}, r"must be a list of pairs, got '640x480'"),
    "sizes of nothing": (
        {"image_sizes": [(0, 0), (28, 28)]},
        r"image_sizes\[0\] is \(0, 0\), not the \(width, height\)",
    ),
    "negative sizes": ({"image_sizes": [(28, 28), (28, -1)]}, r"image_sizes\[1\] is \(28, -1\)"),
    "a letter": ({"image_sizes": ["a", "b"]}, r"image_sizes\[0\] is 'a'"),
    "two letters": ({"image_sizes": ["ab", "cd"]}, r"image_sizes\[0\] is 'ab'"),
    "NaN sizes": ({"image_sizes": [(math.nan, 28), (28, 28)]}, r"image_sizes\[0\] is \(nan, 28\)"),
    "infinite sizes": ({"image_sizes": [(28, 28), (math.inf, 28)]}, r"\[1\] is \(inf, 28\)"),
    "half a pixel": ({"image_sizes": [(28.5, 28), (28, 28)]}, r"image_sizes\[0\] is \(28.5, 28\)"),
    "three numbers": ({"image_sizes": [(28, 28, 3)] * 2}, r"image_sizes\[0\] is \(28, 28, 3\)"),
    "no size": ({"image_sizes": [None, (28, 28)]}, r"image_sizes\[0\] is None"),
    "a pair for a list": ({"image_sizes": (28, 28)}, r"image_sizes\[0\] is 28"),
    "too few sizes": ({"image_sizes": [(28, 28)]}, "image_sizes has 1 entries for 2 images; give"),
    "too many sizes": ({"image_sizes": [(28, 28)] * 3}, "has 3 entries for 2 images"),
    "no tiles": (
        {"images": _pixels(0, 3, 28, 28)},
        r"have no pixels: got shape \[0, 3, 28, 28\]; ",
    ),
    "an image of no tiles": (
        {"images": [_pixels(1, 3, 28, 28), _pixels(0, 3, 28, 28)]},
        r"have no pixels: got shape \[0, 3, 28, 28\]; ",
    ),
    "stacks of no tiles": ({"images": _pixels(2, 0, 3, 28, 28)}, r"have no pixels: got shape"),
    "bytes for pixels": (
        {"images": (_pixels() * 255).byte()},
        r"normalised pixels in floating point; got uint8 tensor \[2, 3, 28, 28\]; .*process_images",
    ),
    "bytes in a list": (
        {"images": [_pixels(3, 28, 28), (_pixels(3, 28, 28) * 255).byte()]},
        r"floating point; got uint8 tensor \[3, 28, 28\]",
    ),
    "whole numbers for pixels": ({"images": _pixels().long()}, r"got int64 tensor"),
    "a row without a token": (
        {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        r"row 1 of attention_mask is 0 throughout.*; set the mask to 1",
    ),
    "another mask": ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be a tensor"),
    "a list for a mask": ({"attention_mask": [[1, 1, 1]] * 2}, r"tensor \[2, 3\].*; got list"),
    "other positions": ({"position_ids": torch.zeros(1, 3)}, r"position_ids must be a tensor"),
}


@pytest.fixture
def models(small_model: Make, small_next: Make) -> list[LlavaLlamaForCausalLM]:
    """Every way to join tiles; sizes count for the first one only in pictures."""
    return [small_model(), small_next(mm_patch_merge_type="flat"), small_next()]


@pytest.mark.parametrize("case", CASES)
def test_generate_and_prepare(case: str, models: list[LlavaLlamaForCausalLM]) -> None:
    changes, message = CASES[case]
    given = {"images": _pixels(), "image_sizes": [(28, 28)] * 2, **changes}
    prompt = {"position_ids": None, "attention_mask": None}
    prompt |= {key: given.pop(key) for key in prompt if key in given}
    for model in models:
        prepare = model.prepare_inputs_labels_for_multimodal
        for call in (
            lambda model=model: model.generate(IDS, **given, **prompt, **GREEDY),
            lambda prepare=prepare: prepare(
                IDS, **prompt, past_key_values=None, labels=None, **given
            ),
        ):
            with pytest.raises(UserInputError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)


def test_prompts_of_a_forward_pass(small_model: Make) -> None:
    prepare = small_model().prepare_inputs_labels_for_multimodal
    for ids, labels, message in (
        (None, None, "needs a prompt: pass ids"),
        (IDS[0], None, r"must be token ids, an int64 tensor \[B, L\]; got int64 tensor \[3\]"),
        (IDS.clamp(max=5).masked_fill(IDS == 7, 64), None, r"token id 64 is not in the vocabulary"),
        (IDS.float(), None, r"must be token ids, .*float32 tensor"),
        (IDS, IDS[:1], r"labels must be a tensor \[2, 3\] like the ids; got int64 tensor \[1, 3\]"),
    ):
        with pytest.raises(UserInputError, match=message):
            prepare(ids, None, None, None, labels, _pixels())


@pytest.mark.parametrize(
    "sizes",
    [
        [(640, 480), (31, 7)],
        ((640, 480), [31, 7]),
        torch.tensor([[640, 480], [31, 7]]),
        [torch.tensor([640, 480]), np.array([31, 7])],
        [(640.0, np.int64(480)), (torch.tensor(31), 7)],
    ],
)
def test_sizes_in_every_form_that_callers_have(sizes: Any) -> None:
    assert check_sizes(sizes, 2) == [(640, 480), (31, 7)]
    assert check_sizes(None, 2) is None


def _spoil(tensor: torch.Tensor, value: float = math.nan) -> None:
    with torch.no_grad():
        tensor.view(-1)[3] = value


@pytest.mark.parametrize("pruning", [None, {"method": "zoo", "keep_tokens": 2}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_traced_to_what_holds_it(value: float, pruning, small_model: Make) -> None:
    model = small_model()
    model.pruning = pruning
    inner = model.get_model()

    def refusal(images: torch.Tensor) -> str:
        with pytest.raises(UserInputError) as caught:
            model.generate(IDS, images=images, **GREEDY)
        return str(caught.value)

    pixels = _pixels()
    _spoil(pixels[1], value)
    assert "the pixels of image 1 hold NaN or inf values; check the pixels" in refusal(pixels)
    features = inner.vision_tower(_pixels())
    _spoil(features[0], value)
    assert "the features of image 0 hold NaN or inf" in refusal(features)
    kept = inner.mm_projector[2].weight.detach().clone()
    _spoil(inner.mm_projector[2].weight, value)
    assert "'2.weight' of the projector holds NaN or inf" in refusal(_pixels())
    with torch.no_grad():
        inner.mm_projector[2].weight.copy_(kept)
    _spoil(inner.vision_tower.vision_tower.encoder.layers[0].mlp.fc1.bias, value)
    assert "layers.0.mlp.fc1.bias' of the vision tower holds NaN" in refusal(_pixels())


def test_overflow_is_told_from_damage(small_model: Make) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_model().mm_projector[2].weight.fill_(1e38)
    with pytest.raises(UserInputError, match=r"overflow in float32, though pixels .*bfloat16"):
        model.generate(IDS, images=_pixels(), **GREEDY)


def test_large_tokens_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((40,), 1e38)) and all_finite(torch.ones(3, dtype=torch.int8))
    assert all_finite(torch.full((4, 70), 65504, dtype=torch.float16))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        values = torch.randn(40, 30).to(dtype)
        assert all_finite(values)
        for bad in ([math.nan], [math.inf], [math.inf, -math.inf]):
            spoilt = values.clone()
            spoilt[7, : len(bad)] = torch.tensor(bad)
            assert not all_finite(spoilt)
