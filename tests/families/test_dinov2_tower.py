"""LLaVA with a DINOv2 tower, whose blocks have other names than CLIP's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import GREEDY, ROWS, STEPS, Shortened, error, inputs_of, tiny
from torch import Tensor
from transformers import Dinov2Config

from llava.model.call_context import asking
from llava.pruning import PruningError, get_method, list_methods, prune
from llava.pruning.lookup import FAMILIES

FAMILY = FAMILIES.get("llava")()
HEADS, LAYERS, USED = 4, 4, 3  # features come from the last block but one
READ = (
    *("cls_attention", "received_attention", "object_attention", "encoder_keys", "cls_feature"),
    *("next_cls_attention", "next_single_head_attention", "next_keys"),
)
METHODS = [name for name in list_methods() if get_method(name).budgeted]


@pytest.fixture(scope="module")
def model() -> Any:
    vision = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=28,
        patch_size=7,
    )
    built = tiny("llava").build(vision=vision)
    built.text_tokenizer = lambda text, add_special_tokens=True: {"input_ids": [3, 4, 5]}
    return built


def attention_of(model: Any, pixels: Tensor) -> list[Tensor]:
    """Return every block's attention [B, heads, S, S], as the tower computes it itself."""
    tower, used = model.model.vision_tower, model.config.vision_config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return [*tower(pixels, output_attentions=True).attentions]
    finally:
        tower.set_attn_implementation(used)


def keys_of(model: Any, pixels: Tensor, index: int) -> Tensor:
    """Return the keys [B, N, C] of the patches in one block."""
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[index]
        block = tower.encoder.layer[index]
        inner = getattr(block.attention, "attention", None)
        product = block.attention.k_proj if inner is None else inner.key
        return product(block.norm1(hidden))[:, 1:]


def test_readings_are_what_the_tower_computes(model: Any) -> None:
    inputs = inputs_of("llava")
    pixels = inputs["pixel_values"]
    with torch.no_grad(), prune(model):  # the hooks are there, nothing is pruned
        visual = FAMILY.encode(model, {"pixel_values": pixels}, inputs["input_ids"], READ)
    found = {name: torch.stack(own) for name, own in visual.extras.items()}
    maps = [own.sum(dim=1) for own in attention_of(model, pixels)]
    near = {"atol": 1e-5, "rtol": 1e-4}
    last, following = maps[USED - 1], maps[USED] / HEADS
    torch.testing.assert_close(found["cls_attention"], last[:, 0, 1:], **near)
    torch.testing.assert_close(found["received_attention"], last.mean(dim=1)[:, 1:], **near)
    torch.testing.assert_close(found["next_cls_attention"], following[:, 0, 1:], **near)
    early = maps[max(1, round(LAYERS * 9 / 24)) - 1].mean(dim=1)[:, 1:]
    torch.testing.assert_close(found["object_attention"], early, **near)
    keys = keys_of(model, pixels, USED - 1).unflatten(-1, (HEADS, -1)).mean(dim=-2)
    torch.testing.assert_close(found["encoder_keys"], keys, **near)
    torch.testing.assert_close(found["next_keys"], keys_of(model, pixels, USED), **near)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found["cls_feature"], states[USED][:, 0], **near)
    torch.testing.assert_close(visual.features, states[USED][:, 1:], **near)
    assert visual.class_token and visual.grid == (4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes(model: Any, method: str) -> None:
    inputs = inputs_of("llava")
    with torch.no_grad(), asking(["what?"] * 3), prune(model, method, keep_tokens=4) as run:
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert "received" not in run.trace.method
    after = run.trace.tokens_after
    assert after == [4, 4, 4] or (not get_method(method).fixed_count and max(after) <= 4)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_decoding_equals_an_uncached_reference(model: Any, positions: str) -> None:
    inputs = inputs_of("llava")
    stock = model(**inputs).logits
    with prune(model, "zoo", keep_tokens=16):
        assert torch.equal(model(**inputs).logits, stock)
    with prune(model, "fastervlm", keep_tokens=6, positions=positions) as run:
        found = model.generate(**inputs, **GREEDY)
    short = Shortened(FAMILY, model, inputs, run.tokens)
    for row in range(len(ROWS)):
        tokens, logits = short.greedy(row, STEPS)
        assert found.sequences[row, -STEPS:].tolist() == tokens
        assert error([step[row] for step in found.logits], logits) <= 1e-5


def test_pictures_of_another_size_are_refused(model: Any) -> None:
    """DINOv2 itself takes them; their tokens would lie in another grid."""
    inputs = inputs_of("llava", [[(28, 28)]])
    inputs["pixel_values"] = torch.zeros(1, 3, 56, 56)
    with (
        pytest.raises(PruningError, match=r"56 x 56.*image_size is 28"),
        prune(model, "zoo", keep_tokens=4),
    ):
        model(**inputs)
