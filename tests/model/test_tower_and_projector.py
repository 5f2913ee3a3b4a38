"""The vision tower stops at the layer it needs; projectors have LLaVA's shapes and names."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from llava.model.multimodal_encoder.builder import build_vision_tower, resolve_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.utils import UserInputError


def _tower(folder: Path, **args: object) -> CLIPVisionTower:
    settings = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", **args}
    return CLIPVisionTower(str(folder), SimpleNamespace(**settings))


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 3])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_are_the_hidden_state_of_the_layer(
    layer: int, feature: str, tmp_path: Path, small_tower: Callable, pixels: Callable
) -> None:
    reference = small_tower(tmp_path)
    tower = _tower(tmp_path, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    images = pixels(2, side=28)
    with torch.no_grad():
        wanted = reference(images, output_hidden_states=True).hidden_states[layer]
    wanted = wanted if feature == "cls_patch" else wanted[:, 1:]
    assert torch.equal(tower(images), wanted)


def test_last_block_is_not_run(tmp_path: Path, small_tower: Callable, pixels: Callable) -> None:
    small_tower(tmp_path)
    tower = _tower(tmp_path)
    ran = []
    for i, layer in enumerate(tower.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    tower(pixels(1, side=28))
    assert ran == [0, 1]


def test_dtypes_lists_and_properties(
    tmp_path: Path, small_tower: Callable, pixels: Callable
) -> None:
    small_tower(tmp_path)
    tower = _tower(tmp_path)
    images = pixels(2, side=28)
    assert tower(images.to(torch.bfloat16)).dtype == torch.bfloat16
    one_by_one = tower(list(images))
    assert [tuple(x.shape) for x in one_by_one] == [(1, 4, 16)] * 2
    assert torch.allclose(torch.cat(one_by_one), tower(images), atol=1e-6)
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (16, 4, 2)
    assert tower.dummy_feature.shape == (1, 16)
    assert tower.is_loaded and tower.dtype == torch.float32 and tower.device.type == "cpu"
    assert not tower(images).requires_grad
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.train().vision_tower.training


def test_processor_defaults_to_the_tower_size(tmp_path: Path, small_tower: Callable) -> None:
    small_tower(tmp_path)
    processor = _tower(tmp_path).image_processor
    assert processor.size["shortest_edge"] == 28
    assert processor.crop_size["height"] == processor.crop_size["width"] == 28
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_full_clip_folder_gives_its_vision_part(tmp_path: Path, pixels: Callable) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    config = CLIPConfig(text_config={**text, "num_attention_heads": 2}, vision_config=vision)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    images = pixels(1, side=28)
    with torch.no_grad():
        hidden = clip.vision_model(images, output_hidden_states=True).hidden_states
    assert torch.equal(_tower(tmp_path)(images), hidden[-2][:, 1:])


def test_relative_names_are_found_in_and_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    inside, beside = checkpoint / "tower", tmp_path / "tower"
    for folder in (checkpoint, beside):
        folder.mkdir()
    (beside / "config.json").write_text("{}")
    assert resolve_vision_tower("tower", str(checkpoint)) == str(beside)
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    assert resolve_vision_tower("tower", str(checkpoint)) == str(inside)
    assert resolve_vision_tower("openai/clip-vit", str(checkpoint)) == "openai/clip-vit"
    assert resolve_vision_tower(str(beside), str(checkpoint)) == str(beside)


def test_errors_name_the_cause(tmp_path: Path, small_tower: Callable, pixels: Callable) -> None:
    folder = tmp_path / "tower"
    with pytest.raises(UserInputError, match=r"cannot find the vision tower .*next to the check"):
        _tower(folder)
    small_tower(folder)
    with pytest.raises(UserInputError, match="takes 28 x 28 pixels, not 30 x 28"):
        _tower(folder)(torch.zeros(1, 3, 28, 30))
    with pytest.raises(UserInputError, match="mm_vision_select_layer 9 does not exist"):
        _tower(folder, mm_vision_select_layer=9)(pixels(1, side=28))
    with pytest.raises(UserInputError, match="mm_vision_select_feature 'cls'"):
        _tower(folder, mm_vision_select_feature="cls")(pixels(1, side=28))
    unloaded = build_vision_tower(
        SimpleNamespace(mm_vision_tower=str(folder), mm_vision_select_layer=-2), delay_load=True
    )
    with pytest.raises(UserInputError, match="no weights yet"):
        unloaded(pixels(1, side=28))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserInputError, match="cannot load the vision tower"):
        unloaded.load_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(UserInputError, match="is of type 'siglip'"):
        _tower(folder)


def test_projectors() -> None:
    def build(kind: str) -> nn.Module:
        config = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=8, hidden_size=12)
        return build_vision_projector(config)

    assert set(build("linear").state_dict()) == {"weight", "bias"}
    assert set(build("mlp2x_gelu").state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [type(m) for m in build("mlp3x_gelu")] == [nn.Linear, nn.GELU] * 2 + [nn.Linear]
    assert build("mlp1x_gelu")(torch.zeros(2, 8)).shape == (2, 12)
    x = torch.randn(2, 8)
    assert build("identity")(x) is x
    assert build("identity").config == {"mm_projector_type": "identity"}
    for kind in ("mlp0x_gelu", "mlpx_gelu", "resampler"):
        with pytest.raises(UserInputError, match=f"unknown mm_projector_type '{kind}'"):
            build(kind)
