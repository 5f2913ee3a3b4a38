"""Operations by formula are those that torch's own counter finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.bench.configs import build_random, shape_of
from llava.bench.counts import (
    _count,
    _shapes_of,
    as_on_device,
    count_stage,
    encode_work,
    forward_work,
    gram_type,
    head_width,
    kv_cache_bytes,
)
from llava.bench.stage import random_tokens
from llava.pruning import PruningConfig, precision, prune_visual_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_random(shape_of("llava-tiny"), device=CPU, dtype=torch.float32, layers=2)


def counted(call: Any) -> int:
    """Operations that torch's counter finds in a call. Its attention must be made of products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def convolution(model: Any) -> int:
    """What the counter says of the patch embedding, a convolution: the same product."""
    config = model.get_vision_tower().config
    return 2 * 3 * config.patch_size**2 * config.hidden_size * 576


def test_encode(model: Any) -> None:
    pixels = torch.zeros(2, 3, 336, 336)
    found = counted(lambda: model.encode_images(pixels))
    assert found == encode_work(model, 2)["flops"]["float32"]
    assert convolution(model) > 0.001 * found, "the patch embedding is large enough to be missed"


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode(model: Any, batch: int) -> None:
    length = 20
    embeds = torch.zeros(batch, length, model.config.hidden_size)
    cache: list[Any] = []

    def prefill() -> None:
        cache.append(model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))

    found = counted(prefill)
    # The counter takes masked pairs of tokens for computed, the formula leaves them out.
    pairs = length**2 - length * (length + 1) // 2
    heads = model.config.num_attention_heads * head_width(model.config)
    masked = 2 * batch * 2 * 2 * pairs * heads
    # transformers 5.17 makes the angles of positions by a product, which the formula leaves out.
    angles = (0, length * head_width(model.config))
    assert found - masked - forward_work(model, 2, batch, length)["flops"]["float32"] in angles
    (out,) = cache
    held = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
    assert 4 * held == kv_cache_bytes(model, 2, batch, length)
    past = out.past_key_values
    step = counted(lambda: model(inputs_embeds=embeds[:, :1], past_key_values=past, use_cache=True))
    angles = (0, head_width(model.config))
    assert step - forward_work(model, 2, batch, 1, length)["flops"]["float32"] in angles


def test_bytes_of_a_decoding_step_are_weights_and_cache(model: Any) -> None:
    layers = model.get_model().layers
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    head, width = model.lm_head.weight.numel(), model.config.hidden_size
    cache = kv_cache_bytes(model, 2, 1, 11)
    assert forward_work(model, 2, 1, 1, 10)["bytes"] == 4 * (weights + head + width) + cache


def stage(method: str, keep: int) -> Any:
    return lambda visual: prune_visual_tokens(visual, PruningConfig(method, keep_tokens=keep))


def test_the_stage_is_counted_as_torch_counts() -> None:
    visual = random_tokens(1, 1, 144, 128, CPU, torch.float32)
    for method in ("divprune", "zoo-exact"):
        call = stage(method, 16)
        call(visual)  # the quadratic form is computed once and is no part of it
        found = counted(lambda call=call: call(visual))
        work = count_stage(call, visual)
        assert sum(work["flops"].values()) == found > 0
        assert work["launches"] is not None and work["launches"] > 10


@pytest.mark.parametrize("method", ["divprune", "zoo"])
def test_shapes_alone_are_counted_as_the_values_are(method: str) -> None:
    """On an accelerator, where kernels hide their products from the counter."""
    visual = random_tokens(1, 1, 144, 128, CPU, torch.float32)
    call = stage(method, 16)
    call(visual)
    shapes = _count(call, _shapes_of(visual), first=True)
    assert shapes["flops"] == count_stage(call, visual)["flops"]


def test_bytes_of_the_stage_are_what_comes_in_and_goes_out() -> None:
    """A gather reads what it returns, and the indices once; its result is what it writes."""
    visual = random_tokens(1, 1, 144, 128, CPU, torch.float32)
    index = torch.arange(16)[None, :, None].expand(1, 16, 128)

    class Gathered:
        projected = torch.empty(0)

    def gather(tokens: Any) -> Any:
        result = Gathered()
        result.projected = 1 * tokens.projected.gather(1, index)  # intermediates do not count
        return result

    work = count_stage(gather, visual)
    assert work["bytes"] == 4 * 16 * 128 + 8 * 16 + 4 * 16 * 128
    assert work["launches"] == 2

    def whole(tokens: Any) -> Any:
        tokens.projected.sum()
        return gather(tokens)

    assert count_stage(whole, visual)["bytes"] == 4 * 144 * 128 + 8 * 16 + 4 * 16 * 128


@pytest.mark.parametrize(("fast", "kind"), [(True, "bfloat16"), (False, "float32")])
def test_shapes_are_multiplied_as_the_device_would(
    fast: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` goes by the device, and shapes alone are on none that multiplies bfloat16 fast."""
    monkeypatch.setattr(
        precision, "multiplies_bf16_fast", lambda device: fast and device.type != "meta"
    )
    visual = random_tokens(1, 1, 144, 128, CPU, torch.bfloat16)
    config = as_on_device(PruningConfig("zoo-exact", keep_tokens=16), torch.bfloat16, CPU)
    shapes = _count(
        lambda tokens: prune_visual_tokens(tokens, config), _shapes_of(visual), True, "bfloat16"
    )
    gram = 2 * 144 * 144 * 128
    assert shapes["flops"]["bfloat16"] >= gram, "16-bit tokens are multiplied as they are"
    scores = {**shapes["flops"], "bfloat16": shapes["flops"]["bfloat16"] - gram}
    assert max(scores, key=lambda name: scores[name]) == kind


def test_the_gram_matrix_is_booked_under_the_type_of_the_tokens() -> None:
    visual = random_tokens(1, 1, 144, 128, CPU, torch.bfloat16)
    call = stage("divprune", 16)
    assert _count(call, _shapes_of(visual), True)["flops"] == {"float32": 2 * 144 * 144 * 128}
    booked = _count(call, _shapes_of(visual), True, "bfloat16")
    assert booked["flops"] == {"bfloat16": 2 * 144 * 144 * 128}
    assert gram_type(visual.projected) is None, "on the CPU it is a float32 product"


def test_a_setting_of_an_older_checkout_is_left_alone() -> None:
    older: Any = object()
    assert as_on_device(older, torch.bfloat16, CPU) is older
