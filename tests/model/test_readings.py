"""What methods read inside the tower equals CLIP's eager attention; nothing else is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.multimodal_encoder import readings
from llava.pruning import PruningConfig, prune
from llava.pruning.tokens import ENCODER_EXTRAS
from llava.utils import UserInputError


@pytest.fixture
def model(small_model: Callable):
    return small_model()


def eager(model, tmp_path: Path, pixels: torch.Tensor):
    """Attentions of every block of the same tower with eager attention, and its hidden states."""
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower", attn_implementation="eager")
    tower.load_state_dict(model.get_vision_tower().vision_tower.state_dict())
    out = tower.eval()(pixels, output_attentions=True, output_hidden_states=True)
    return tower, out.attentions, out.hidden_states


def test_equal_the_eager_tower(model, tmp_path: Path, pixels) -> None:
    images = pixels(3, side=28)
    visual = model.encode_visual_tokens(images, needs=ENCODER_EXTRAS)
    with torch.no_grad():
        tower, attention, hidden = eager(model, tmp_path, images)
        # 3 blocks, features from hidden state 2: blocks 1 (features), 2 (next), 0 (9/24 of depth).
        keys = {}
        for index in (1, 2):
            layer = tower.encoder.layers[index]
            keys[index] = layer.self_attn.k_proj(layer.layer_norm1(hidden[index]))
        query = tower.encoder.layers[2]
        query = query.self_attn.q_proj(query.layer_norm1(hidden[2]))[:, :1]
        single = (query @ keys[2].transpose(1, 2) / 16**0.5).softmax(dim=-1)
    want = {
        "cls_attention": attention[1].sum(dim=1)[:, 0, 1:],
        "received_attention": attention[1].sum(dim=1).mean(dim=1)[:, 1:],
        "encoder_keys": keys[1][:, 1:].unflatten(-1, (2, 8)).mean(dim=2),
        "cls_feature": hidden[2][:, 0],
        "object_attention": attention[0].sum(dim=1).mean(dim=1)[:, 1:],
        "next_cls_attention": attention[2].mean(dim=1)[:, 0, 1:],
        "next_single_head_attention": single[:, 0, 1:],
        "next_keys": keys[2][:, 1:],
    }
    assert set(visual.extras) == set(want) == set(ENCODER_EXTRAS)
    for name, value in want.items():
        torch.testing.assert_close(torch.stack(visual.extras[name]), value, atol=2e-6, rtol=1e-5)


def test_nothing_is_read_that_no_method_asked_for(model, pixels, monkeypatch) -> None:
    calls: list[str] = []
    for name, reading in readings.READINGS.items():

        def counted(*args, name=name, reading=reading):
            calls.append(name)
            return reading(*args)

        monkeypatch.setitem(readings.READINGS, name, counted)
    images = pixels(2, side=28)
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX], [1, IMAGE_TOKEN_INDEX]])

    def run() -> None:
        model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)

    run()
    with prune(model, PruningConfig("divprune", keep_tokens=2)):
        run()
    assert calls == []
    visual = model.encode_visual_tokens(images, needs=["cls_attention", "features"])
    assert calls == ["cls_attention"]
    assert set(visual.extras) == {"cls_attention"}


@pytest.mark.parametrize("compiled", ["module", "forward"])
def test_a_compiled_tower_is_read_call_by_call(model, pixels, compiled: str) -> None:
    """What the first call needed must not be compiled into the calls after it."""
    images = pixels(2, side=28)
    calls = [(), ("cls_attention",), ("encoder_keys", "cls_feature"), ()]
    want = [model.encode_visual_tokens(images, needs=needs) for needs in calls]
    tower = model.get_vision_tower()
    if compiled == "module":
        tower.compile(backend="eager")
    else:
        tower.forward = torch.compile(tower.forward, backend="eager")
    for needs, wanted in zip(calls, want, strict=True):
        got = model.encode_visual_tokens(images, needs=needs)
        assert torch.equal(got.features, wanted.features)
        assert set(got.extras) == set(needs)
        for name in needs:
            assert all(map(torch.equal, got.extras[name], wanted.extras[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_read_outside_autocast(model, dtype: torch.dtype) -> None:
    """The same hidden states give the same readings, whatever the tower around them runs in."""
    layers = model.get_vision_tower().vision_tower.encoder.layers
    width = layers[0].layer_norm1.weight.shape[0]
    hidden = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))

    def read() -> dict[str, list[torch.Tensor]]:
        reader = readings.TowerReader(readings.READINGS)
        for index in range(len(layers)):
            reader.read_block(index, 2, layers, hidden, 1)
        return reader.extras(2)

    with torch.no_grad():
        want = read()
        with torch.autocast("cpu", dtype=dtype):
            got = read()
    for name, values in want.items():
        assert all(map(torch.equal, got[name], values)), name


def test_reading_changes_no_feature(model, pixels) -> None:
    images = pixels(2, side=28)
    plain = model.encode_visual_tokens(images)
    read = model.encode_visual_tokens(images, needs=ENCODER_EXTRAS)
    assert torch.equal(plain.features, read.features)
    assert plain.extras == {}


def test_tiles_of_several_images_keep_their_own(small_next: Callable, pixels) -> None:
    model = small_next()
    images = [pixels(3, side=28), pixels(2, side=28, seed=1)]
    sizes = [(56, 28), (28, 28)]
    visual = model.encode_visual_tokens([images[0]], sizes[:1], ["cls_attention"])
    both = model.encode_visual_tokens(
        [images[0], images[0].flip(0)], sizes[:1] * 2, ["cls_attention"]
    )
    assert len(both.extras["cls_attention"]) == 6
    for tile in range(3):
        for other in (tile, 5 - tile):
            torch.testing.assert_close(
                both.extras["cls_attention"][other], visual.extras["cls_attention"][tile]
            )
    taken = both.take_images([1])
    assert torch.equal(taken.extras["cls_attention"][0], both.extras["cls_attention"][3])


def test_cached_features_and_other_towers_are_refused(small_model: Callable, pixels) -> None:
    model = small_model()
    features = model.get_vision_tower()(pixels(2, side=28))
    with pytest.raises(UserInputError, match=r"cls_attention.*features computed before"):
        model.encode_visual_tokens(features, needs=["cls_attention"])
    # The last hidden state has no block after it.
    model = small_model(mm_vision_select_layer=-1)
    model.encode_visual_tokens(pixels(2, side=28), needs=["cls_attention"])
    with pytest.raises(UserInputError, match=r"next_keys.*mm_vision_select_layer -2"):
        model.encode_visual_tokens(pixels(2, side=28), needs=["next_keys"])
    model = small_model(mm_vision_select_feature="cls_patch")
    with pytest.raises(UserInputError, match="mm_vision_select_feature 'patch'"):
        model.encode_visual_tokens(pixels(2, side=28), needs=["cls_attention"])
