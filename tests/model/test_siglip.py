"""Towers without a class token: SigLIP equals transformers', and every method can run on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_next import picture, prepared
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.engine.batches import Plan
from llava.eval.engine.request import parse_arm
from llava.eval.engine.runner import Runner
from llava.eval.tasks.base import Item
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.hugging_face import native_form
from llava.model.loaded import LoadedModel
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava.pruning import PruningConfig, get_method, list_methods, prune
from llava.pruning.tokens import ENCODER_EXTRAS
from llava.sampling import Sampling
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
IDS = torch.tensor([[1, IMG, 5], [1, IMG, 7]])
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
# Methods whose choice is the class token's attention where there is one.
BY_CLASS = {
    *("agilepruner", "fastervlm", "prumerge", "prumerge-plus", "scope", "visionzip", "vispruner")
}


def _tower(folder: Path, **args: object) -> SiglipVisionTower:
    settings = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", **args}
    return build_vision_tower(SimpleNamespace(mm_vision_tower=str(folder), **settings))


@pytest.fixture
def model(small_model: Callable, small_siglip: Callable, tmp_path: Path):
    small_siglip(tmp_path / "tower")
    return small_model()


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 2])
def test_features_are_the_hidden_state_of_the_layer(
    layer: int, tmp_path: Path, small_siglip: Callable, pixels: Callable
) -> None:
    reference, images = small_siglip(tmp_path), pixels(2, side=28)
    with torch.no_grad():
        wanted = reference(images, output_hidden_states=True).hidden_states[layer]
    for feature in ("patch", "cls_patch"):
        tower = _tower(tmp_path, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
        assert torch.equal(tower(images), wanted)
    assert (tower.num_patches, tower.num_patches_per_side, tower.hidden_size) == (4, 2, 16)
    with pytest.raises(UserInputError, match="mm_vision_select_feature 'cls'"):
        _tower(tmp_path, mm_vision_select_feature="cls")(images)


def test_the_config_of_a_tower_decides_its_kind(
    tmp_path: Path, small_siglip: Callable, small_tower: Callable, pixels: Callable
) -> None:
    small_siglip(tmp_path / "clip-in-name-only")
    assert isinstance(_tower(tmp_path / "clip-in-name-only"), SiglipVisionTower)
    small_tower(tmp_path / "siglip")
    assert isinstance(_tower(tmp_path / "siglip"), CLIPVisionTower)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 32}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    both = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    both.save_pretrained(tmp_path / "both")
    images = pixels(1, side=28)
    with torch.no_grad():
        hidden = both.vision_model(images, output_hidden_states=True).hidden_states
    assert torch.equal(_tower(tmp_path / "both")(images), hidden[-2])
    file = tmp_path / "siglip" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "dinov2"}))
    with pytest.raises(UserInputError, match=r"type 'dinov2'; .* CLIP or SigLIP model"):
        _tower(tmp_path / "siglip")
    late = build_vision_tower(SimpleNamespace(mm_vision_tower="no/where"), delay_load=True)
    with pytest.raises(UserInputError, match="cannot find the vision tower 'no/where'"):
        late.load_model()


def test_readings_equal_the_eager_tower(model, tmp_path: Path, pixels: Callable) -> None:
    images = pixels(3, side=28)
    tower = SiglipVisionModel.from_pretrained(tmp_path / "tower", attn_implementation="eager")
    tower.load_state_dict(model.get_vision_tower().vision_tower.state_dict())
    with torch.no_grad():
        out = tower.eval()(images, output_attentions=True, output_hidden_states=True)
        keys, queries = {}, {}
        for index in (1, 2):
            layer = tower.encoder.layers[index]
            x = layer.layer_norm1(out.hidden_states[index])
            keys[index], queries[index] = layer.self_attn.k_proj(x), layer.self_attn.q_proj(x)
        single = (queries[2] @ keys[2].transpose(1, 2) / 16**0.5).softmax(dim=-1)
    received = [a.sum(dim=1).mean(dim=1) for a in out.attentions]
    want = {
        "cls_attention": received[1],
        "received_attention": received[1],
        "encoder_keys": keys[1].unflatten(-1, (2, 8)).mean(dim=2),
        "object_attention": received[0],
        "next_cls_attention": received[2] / 2,
        "next_single_head_attention": single.mean(dim=1),
        "next_keys": keys[2],
    }
    visual = model.encode_visual_tokens(images, needs=ENCODER_EXTRAS)
    assert not visual.class_token and set(visual.extras) == set(want)
    assert set(want) == set(ENCODER_EXTRAS) - {"cls_feature"}
    for name, value in want.items():
        torch.testing.assert_close(torch.stack(visual.extras[name]), value, atol=2e-6, rtol=1e-5)
    assert torch.equal(visual.features, model.encode_visual_tokens(images).features)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_generates_and_names_what_it_read(name: str, model, pixels) -> None:
    model.text_tokenizer = lambda text, add_special_tokens: {"input_ids": [3, 4]}
    questions = ["What is it?"] * 2 if get_method(name).query_aware else None
    traces = []
    original = model.prune_visual_tokens

    def traced(visual):
        pruned = original(visual)
        traces.append((pruned.trace, visual.class_token))
        return pruned

    model.prune_visual_tokens = traced
    budget = {"keep_tokens": 2} if get_method(name).budgeted else {}
    model.pruning = {"method": name, **budget}
    out = model.generate(IDS, images=pixels(2, side=28), questions=questions, **GREEDY)
    assert out.shape == (2, 3)
    ((trace, class_token),) = traces
    assert not class_token
    if budget:
        assert trace.tokens_after == [2, 2]
        assert ("(attention=received)" in trace.method) == (name in BY_CLASS)


def test_choices_without_a_class_token(model, pixels: Callable) -> None:
    images = pixels(2, side=28)

    def pruned(name: str, **options: object):
        with torch.no_grad(), prune(model, PruningConfig(name, keep_tokens=2, options=options)):
            return model.prune_visual_tokens(model.encode_visual_tokens(images))

    received = model.encode_visual_tokens(images, needs=["received_attention"]).extras
    scores = torch.stack(received["received_attention"])
    most = scores.topk(2).indices.sort().values
    for name, options in (
        ("fastervlm", {}),
        ("fopru", {}),
        ("fopru", {"class_query": True}),
        ("fopru", {"significance": "class"}),
    ):
        visual = pruned(name, **options)
        assert torch.equal(visual.kept, most)
        asked = name == "fastervlm" or options == {"significance": "class"}
        assert visual.trace.method == name + "(attention=received)" * asked
    # VisionZip: every dominant token is a patch.
    whole = model.encode_visual_tokens(images).projected
    dominant = pruned("visionzip", contextual=0)
    assert torch.equal(dominant.projected, whole.gather(1, most[..., None].expand(-1, -1, 32)))
    merged = pruned("visionzip", contextual=1)
    first = scores.argmax(dim=1)
    assert torch.equal(merged.projected[:, 0], whole[torch.arange(2), first])
    assert merged.sources.sum(dim=2).tolist() == [[1, 3], [1, 3]]


@pytest.mark.parametrize("name", ["fastervlm", "hiprune", "prumerge", "visionzip"])
def test_tiles(name: str, small_next: Callable, small_siglip: Callable, tmp_path: Path) -> None:
    small_siglip(tmp_path / "tower")
    model = small_next()
    shown = prepared(model, [(64, 48), (118, 31)])
    assert [tuple(tiles.shape) for tiles in shown["images"]] == [(5, 3, 28, 28), (4, 3, 28, 28)]
    with torch.no_grad(), prune(model, PruningConfig(name, keep_tokens=6)):
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**shown))
    assert visual.trace.tokens_after == [6, 6]


def test_pixels_are_those_of_the_siglip_processor(model) -> None:
    """Squeezed, not cropped; padded with the processor's own mean."""
    image, size = picture((64, 48)), {"height": 28, "width": 28}
    processor = model.get_vision_tower().image_processor
    reference = SiglipImageProcessorPil(size=size)
    wanted = reference.preprocess(image, return_tensors="pt")["pixel_values"]
    got = process_images([image], processor, model.config)
    assert torch.equal(got, wanted)
    visual = model.encode_visual_tokens(got, [(64, 48)])
    assert visual.layouts[0].base_box == (0.0, 0.0, 64.0, 48.0)
    model.config.image_aspect_ratio = "pad"
    padded = process_images([image], processor, model.config)
    assert padded.shape == (1, 3, 28, 28) and padded[0, :, 0].abs().max() < 0.01  # 127 / 255


def _logits(model) -> torch.Tensor:
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(IDS, images=images).logits


@pytest.mark.parametrize("head", [True, False])
def test_a_checkpoint_that_carries_its_tower(head: bool, model, tmp_path: Path) -> None:
    model.config.unfreeze_mm_vision_tower = True
    wanted = _logits(model)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    weights = load_file(file)
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert any(key.startswith(f"{prefix}head.") for key in weights)
    if not head:  # no LLaVA runs it, so many leave it out
        weights = {k: v for k, v in weights.items() if not k.startswith(f"{prefix}head.")}
        save_file(weights, file, metadata={"format": "pt"})
    loaded = load_pretrained_model(str(tmp_path / "saved"), device="cpu")[1]
    assert isinstance(loaded.get_vision_tower(), SiglipVisionTower)
    assert loaded.get_vision_tower().from_checkpoint
    assert torch.equal(_logits(loaded), wanted)
    del weights[f"{prefix}encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserInputError, match="1 missing weights"):
        load_pretrained_model(str(tmp_path / "saved"), device="cpu")


@pytest.fixture
def theirs() -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(**text, num_attention_heads=4),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        vision_feature_select_strategy="full",
        image_token_id=60,
        image_seq_length=4,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_hugging_face_form(theirs, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_pretrained_model(str(tmp_path / "hf"), device="cpu")[1]
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    marks = torch.tensor([[1, *[60] * 4, 5], [1, *[60] * 4, 7]])
    with torch.no_grad():
        wanted = theirs(input_ids=marks, pixel_values=images).logits
    torch.testing.assert_close(_logits(ours), wanted, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = load_pretrained_model(str(tmp_path / "ours"), device="cpu")[1]
    assert torch.equal(_logits(again), _logits(ours))


def test_hugging_face_form_that_drops_a_patch_is_refused(theirs) -> None:
    config = {**theirs.config.to_dict(), "vision_feature_select_strategy": "default"}
    with pytest.raises(UserInputError, match="vision_feature_select_strategy is 'default'"):
        native_form(config, "somewhere")


def test_tables_say_what_a_method_read(model, pixels: Callable) -> None:
    subject = LoadedModel(model, None, None, "vicuna_v1")
    question = Item(0, 0, (), "What is it?", "What is it?")
    runner = Runner(subject, None, Plan.of([question], 1), sampling=Sampling(), seed=0)
    visual = model.encode_visual_tokens(pixels(1, side=28))
    arms = map(parse_arm, ("none", "random@1", "hiprune@1", "scope@1"))
    labels = [runner.label(visual, arm) for arm in arms]
    assert labels == ["none", "random", "hiprune", "scope(attention=received)"]
