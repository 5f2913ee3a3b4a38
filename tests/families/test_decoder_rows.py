"""Attention of a few tokens beside eager attention; pruning between layers in all surroundings."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_checks import FASTV, SETTINGS
from family_checks import GREEDY, error, inputs_of, shared_model, tiny
from PIL import Image
from saved import save_checkpoint
from test_same_as_native import ROWS, native_inputs, pair  # noqa: F401
from test_surroundings_of_models import offloaded
from tiny_parts import TEXT
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from llava.families import load
from llava.families.dialogue import IMAGE, Dialogue
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning import PruningError, attach, detach, prune
from llava.pruning.decoder.layers import attention_rows
from llava.pruning.lookup import FAMILIES

KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaModel, LlamaConfig(**TEXT)),
    "llama without groups": (LlamaModel, LlamaConfig(**{**TEXT, "num_key_value_heads": 4})),
    "mistral": (MistralModel, MistralConfig(**TEXT, sliding_window=None)),
    "qwen2": (Qwen2Model, Qwen2Config(**TEXT)),
    "qwen3": (Qwen3Model, Qwen3Config(**TEXT, head_dim=32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beside_sdpa_are_those_of_eager_attention(kind: str) -> None:
    cls, config = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eager = cls._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        for name, parameter in eager.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
            elif "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        embeds = torch.randn(2, 12, config.hidden_size)
    sdpa = cls._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :3] = False
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    given = {"inputs_embeds": embeds, "attention_mask": valid.long(), "position_ids": positions}
    seen: list[Any] = []
    for layer in sdpa.layers:
        layer.register_forward_pre_hook(
            lambda own, args, kwargs: seen.append((args[0], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
    with torch.no_grad():
        maps = eager(**given, output_attentions=True).attentions
        sdpa(**given)
        queries, decoder = torch.tensor([[11, 4], [11, 7]]), TransformersDecoder(sdpa)
        for layer, (hidden, rotary) in enumerate(seen):
            rows = attention_rows(decoder, layer, hidden, rotary, valid, queries)
            for row in range(2):
                wanted = maps[layer][row][:, queries[row]]
                assert (rows[row] - wanted).abs().max() <= 1e-5
    assert float(maps[0].max()) > 0.3  # not all alike


@pytest.mark.parametrize("setting", SETTINGS)
def test_native_and_transformers_classes_drop_the_same(pair: Any, setting: str) -> None:  # noqa: F811
    name, stock, native = pair
    inputs = inputs_of(name, ROWS[name])
    with prune(stock, **SETTINGS[setting]) as run:
        found = stock.generate(**inputs, **GREEDY)
    with prune(native, **SETTINGS[setting]) as own:
        wanted = native.generate(**native_inputs(inputs), **GREEDY)
    assert error(found.logits, wanted.logits) <= 1e-4
    assert run.decoder_trace.per_layer == own.decoder_trace.per_layer
    for one, other in zip(run.decoder_trace.picks, own.decoder_trace.picks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_text_models_are_pruned_between_layers(kind: str) -> None:
    model, inputs = tiny("llava").build(text=KINDS[kind][1]), inputs_of("llava")
    with prune(model, **SETTINGS["pyramiddrop"]) as run:
        found = model.generate(**inputs, **GREEDY)
    with prune(model, "fastv", keep_ratio=1.0):
        stock = model.generate(**inputs, **GREEDY)
    assert run.decoder_trace.per_layer == [[16, 9, 4]] * 3
    assert error(found.logits, stock.logits) > 1e-3


def test_a_sliding_window_is_refused_before_anything_is_encoded() -> None:
    config = MistralConfig(**TEXT, sliding_window=16)
    model, inputs = tiny("llava").build(text=config), inputs_of("llava")
    model.model.vision_tower.register_forward_hook(lambda *call: pytest.fail("it was encoded"))
    with (
        prune(model, **SETTINGS["zoo+fastv"]),
        pytest.raises(PruningError, match="sliding_window=16"),
    ):
        model.generate(**inputs)


@pytest.mark.parametrize("how", ["cpu_offload", "device_map"])
@pytest.mark.parametrize("setting", ["fastv", "zoo+pyramiddrop"])
def test_offloaded_models_drop_the_same(how: str, setting: str, tmp_path: Path) -> None:
    model, inputs = tiny("llava").build(), inputs_of("llava")
    offloaded(how, model, tmp_path)
    with prune(shared_model("llava"), **SETTINGS[setting]) as run:
        wanted = shared_model("llava").generate(**inputs, **GREEDY)
    with prune(model, **SETTINGS[setting]) as own:
        found = model.generate(**inputs, **GREEDY)
    assert own.decoder_trace.per_layer == run.decoder_trace.per_layer
    assert error(found.logits, wanted.logits) <= 1e-6


def test_an_attached_setting_is_saved_and_copies_are_stock(tmp_path: Path) -> None:
    model, inputs = tiny("llava").build(), inputs_of("llava")
    stock = model.generate(**inputs, **GREEDY)
    attach(model, "zoo", keep_ratio=0.6, decoder=FASTV)
    pruned = model.generate(**inputs, **GREEDY)
    assert error(pruned.logits, stock.logits) > 1e-3
    copies = [copy.deepcopy(model)]
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    for other in (*copies, saved):
        assert torch.equal(other.generate(**inputs, **GREEDY).sequences, stock.sequences)
        attach(other)
        assert torch.equal(other.generate(**inputs, **GREEDY).sequences, pruned.sequences)
        detach(other)
    cache = pickle.loads(pickle.dumps(pruned.past_key_values))
    token = {"input_ids": torch.tensor([[5]] * 3)}
    with torch.no_grad():
        found = model(**token, past_key_values=cache).logits
        assert torch.equal(found, model(**token, past_key_values=pruned.past_key_values).logits)
    detach(model)


def test_frames_of_a_video_are_images() -> None:
    model, frames = shared_model("llava_onevision"), 2
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, frames, 3, 28, 28, generator=numbers)
    family = FAMILIES.get("llava_onevision")()
    layouts = family.frames(model, {"pixel_values_videos": pixels})
    count = sum(len(layout.sequence) for layout in layouts)
    ids = torch.tensor([[5, 6, *[151] * count, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with prune(model, **SETTINGS["fastv"]) as run:
        model.generate(**inputs, pixel_values_videos=pixels, **GREEDY)
    assert run.decoder_trace.tokens_in == run.tokens.lengths()
    assert len(run.decoder_trace.per_layer) == frames


@pytest.fixture(scope="module", params=["internvl", "llava_onevision"])
def asked(request: Any, tmp_path_factory: Any) -> Any:
    return load(
        str(save_checkpoint(request.param, tmp_path_factory.mktemp("m") / request.param)),
        device="cpu",
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_checkpoint_that_is_asked_is_the_stock_class(asked: Any, setting: str) -> None:
    """Two prompts of different lengths, one of them without an image, and each alone."""
    picture = asked.prepare(Image.effect_noise((60, 60), 50).convert("RGB"))
    shown = Dialogue(((IMAGE, "what is it?"),))
    rows = [asked.row(shown), asked.row(Dialogue((("hello",),)))]
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), prune(asked.model, **SETTINGS[setting]) as run:
        both = asked.answer(rows, [picture], ["what is it?", "hello"], **options)
        trace = run.decoder_trace
        alone = asked.answer(rows[:1], [picture], ["what is it?"], **options)
        assert trace.per_layer == run.decoder_trace.per_layer
        ids = asked._written_out(rows[0], [trace.tokens_in[0]])[0][None]
        if setting in ("fastv", "pyramiddrop"):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture.inputs}
            given.pop("num_patches", None)
            stock = asked.model.generate(**given, **options)[:, ids.shape[1] :]
            assert torch.equal(stock, alone)
    assert torch.equal(both[:1], alone)
    assert trace.tokens_last[0] < trace.tokens_in[0]
