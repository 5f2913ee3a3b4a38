"""Checkpoints: every accepted layout loads, what is saved is LLaVA's layout, errors are clear."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig
from llava.utils import UserInputError

IDS = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9]])
INNER = "model.vision_tower.vision_tower.vision_model."
Make = Callable[..., LlavaLlamaForCausalLM]


def _logits(model: LlavaLlamaForCausalLM, side: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        return model(IDS, images=pixels).logits


def _load(folder: Path, **kwargs: object) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(str(folder), device="cpu", **kwargs)[1]


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def _rename_weights(folder: Path, rename: Callable[[str], str | None]) -> None:
    file = folder / "model.safetensors"
    renamed = {rename(key): value for key, value in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, metadata={"format": "pt"})


@pytest.fixture
def saved(small_model: Make, tmp_path: Path) -> Path:
    """A saved model with its tower's weights inside."""
    model = small_model(unfreeze_mm_vision_tower=True)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_names_are_those_of_llava(saved: Path) -> None:
    keys = set(load_file(saved / "model.safetensors"))
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= keys
    tower = {key for key in keys if "vision_tower" in key}
    assert all(key.startswith(INNER) for key in tower)
    assert f"{INNER}pre_layrnorm.weight" in tower
    assert f"{INNER}encoder.layers.2.self_attn.out_proj.bias" in tower
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["model_type"] == "llava_llama"
    assert config["rope_theta"] == 10000.0


def _shapes(file: Path) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in load_file(file).items()}


def test_the_original_code_finds_its_names(tiny_folder: Path, tmp_path: Path) -> None:
    """Saved again, recorded checkpoints of the original code have the weights it wrote itself."""
    copy = tmp_path / "llava15-tiny"
    shutil.copytree(tiny_folder, copy)
    _edit_config(copy, mm_vision_tower=str(tiny_folder.parent / "clip-tiny-patch14-336"))
    _load(copy).save_pretrained(tmp_path / "without")
    recorded = _shapes(tiny_folder / "model.safetensors")
    assert _shapes(tmp_path / "without" / "model.safetensors") == recorded
    # with its tower inside, a model has what the recorded LLaVA-1.6 has, less the newline
    _load(tiny_folder).save_pretrained(tmp_path / "with")
    recorded = _shapes(tiny_folder.parent / "llava16-tiny" / "model.safetensors")
    del recorded["model.image_newline"]
    assert _shapes(tmp_path / "with" / "model.safetensors") == recorded


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards"])
def test_round_trip(layout: str, small_model: Make, tmp_path: Path) -> None:
    model = small_model(unfreeze_mm_vision_tower=True)
    folder = tmp_path / "saved"
    shards = {"max_shard_size": "20KB"} if "shards" in layout else {}
    model.save_pretrained(folder, **shards)
    if "bin" in layout:
        for file in folder.glob("*.safetensors"):
            name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(file), folder / name)
            file.unlink()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace("model-", "pytorch_model-")
            text = text.replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    assert ("shards" in layout) == bool(list(folder.glob("*.index.json")))
    loaded = _load(folder)
    assert loaded.get_vision_tower().from_checkpoint
    state, wanted = loaded.state_dict(), model.state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert torch.equal(_logits(loaded), _logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(_load(tmp_path / "again")), _logits(model))


def test_flat_tower_names_load_too(saved: Path) -> None:
    wanted = _logits(_load(saved))
    _rename_weights(saved, lambda key: key.replace(INNER, INNER.removesuffix("vision_model.")))
    assert torch.equal(_logits(_load(saved)), wanted)


def test_weights_in_the_checkpoint_win_over_the_tower_folder(saved: Path, small_model: Make):
    model = _load(saved)
    with torch.no_grad():
        model.get_vision_tower().vision_tower.pre_layrnorm.weight.add_(1.0)
    wanted = _logits(model)
    model.save_pretrained(saved)
    assert torch.equal(_logits(_load(saved)), wanted)
    assert not torch.equal(wanted, _logits(small_model()))


def test_tower_of_the_checkpoint_stays_in_it(saved: Path, tmp_path: Path) -> None:
    _edit_config(saved, unfreeze_mm_vision_tower=False)
    _load(saved).save_pretrained(tmp_path / "again")
    keys = load_file(tmp_path / "again" / "model.safetensors")
    assert any(key.startswith(INNER) for key in keys)


def test_frozen_stock_tower_is_not_saved(small_model: Make, tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "saved")
    assert not any("vision_tower" in k for k in load_file(tmp_path / "saved/model.safetensors"))
    loaded = _load(tmp_path / "saved")
    assert not loaded.get_vision_tower().from_checkpoint
    assert torch.equal(_logits(loaded), _logits(model))


def test_tower_found_beside_the_checkpoint_travels_along(tiny, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "moved")
    tower = tmp_path / "moved" / "clip-tiny-patch14-336"
    assert {"config.json", "preprocessor_config.json"} == {f.name for f in tower.iterdir()}
    loaded = _load(tmp_path / "moved")
    assert loaded.get_vision_tower().from_checkpoint
    assert torch.equal(_logits(loaded, 336), _logits(tiny, 336))


def test_self_contained_folder(small_model: Make, small_tower: Callable, tmp_path: Path) -> None:
    """Config, tower description in a subfolder, weights in the main file: no network needed."""
    folder = tmp_path / "whole"
    small_tower(folder / "vision_tower")
    model = small_model(mm_vision_tower=str(folder / "vision_tower"))
    model.config.mm_vision_tower = "vision_tower"
    model.config.unfreeze_mm_vision_tower = True
    model.save_pretrained(folder)
    (folder / "vision_tower" / "model.safetensors").unlink()
    shutil.move(folder, tmp_path / "elsewhere")
    tokenizer, loaded, processor, context = load_pretrained_model(
        str(tmp_path / "elsewhere"), None, "llava-tiny", device="auto"
    )
    assert tokenizer is None and context == 2048
    assert processor.crop_size["height"] == 28
    assert torch.equal(_logits(loaded), _logits(model))


def test_released_configs_and_unknown_keys(saved: Path, tmp_path: Path) -> None:
    wanted = _logits(_load(saved))
    _edit_config(saved, model_type="llava", mm_resampler_type=None, tune_mm_mlp_adapter=False)
    _edit_config(saved, max_sequence_length=77, my_own_key=[1, 2], rope_parameters="absent")
    # LLaVA-1.5 has it, and transformers refuses to save a config that does
    _edit_config(saved, max_length=4096)
    _, model, _, context = load_pretrained_model(str(saved), device="cpu")
    assert context == 77 and torch.equal(_logits(model), wanted)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["my_own_key"] == [1, 2] and config["model_type"] == "llava_llama"
    assert config["tune_mm_mlp_adapter"] is False


def test_derived_buffers_of_old_files_are_ignored(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights[f"{INNER}embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert _load(saved).get_vision_tower().is_loaded


def test_dtypes(saved: Path) -> None:
    assert _load(saved).dtype == torch.float32
    for keyword in ("dtype", "torch_dtype"):
        model = _load(saved, **{keyword: torch.bfloat16})
        assert model.dtype == model.get_vision_tower().dtype == torch.bfloat16
    model = _load(saved, multimodal=True, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_pruning_is_saved_and_overridden(saved: Path, tmp_path: Path) -> None:
    config = PruningConfig("zoo", keep_tokens=2, options={"seed": 3})
    model = _load(saved, pruning=config)
    assert model.pruning == config
    model.save_pretrained(tmp_path / "pruned")
    stored = json.loads((tmp_path / "pruned" / "config.json").read_text())["mm_token_pruning"]
    assert stored == {"method": "zoo", "keep_tokens": 2, "options": {"seed": 3}}
    again = _load(tmp_path / "pruned")
    assert again.pruning == config and _logits(again).shape[1] == 3 + 2
    assert torch.equal(_logits(again), _logits(model))
    other = _load(tmp_path / "pruned", pruning={"method": "none"})
    assert torch.equal(_logits(other), _logits(_load(saved)))


def test_auto_classes_know_the_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model, LlavaLlamaForCausalLM)
    assert torch.equal(_logits(model), _logits(_load(saved)))


def test_plain_llama_becomes_a_llava(small_tower: Callable, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    base.save_pretrained(tmp_path / "base")
    small_tower(tmp_path / "tower")
    adapter = {"x.mm_projector.weight": torch.ones(32, 16), "x.mm_projector.bias": torch.ones(32)}
    torch.save(adapter, tmp_path / "mm_projector.bin")
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert model.get_vision_tower() is None
    settings = SimpleNamespace(
        vision_tower=str(tmp_path / "tower"),
        mm_vision_select_layer=-2,
        pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"),
    )
    model.get_model().initialize_vision_modules(settings)
    assert model.get_model().mm_projector.weight.eq(1).all()
    assert model.config.mm_hidden_size == 16 and model.config.mm_projector_type == "linear"
    assert _logits(model).shape == (1, 7, 64)
    model.save_pretrained(tmp_path / "llava")
    assert torch.equal(_logits(_load(tmp_path / "llava")), _logits(model))
    with pytest.raises(UserInputError, match="plain language model without a vision tower"):
        _load(tmp_path / "base")
    other = {"mm_projector.weight": torch.ones(32, 8)}
    torch.save(other, tmp_path / "other.bin")
    (tmp_path / "torn.bin").write_bytes(b"PK\x03\x04")
    faults = {"other": "needs", "torn": "torn.bin", "absent": "no projector file"}
    for name, match in faults.items():
        settings.pretrain_mm_mlp_adapter = str(tmp_path / f"{name}.bin")
        with pytest.raises(UserInputError, match=match):
            model.get_model().initialize_vision_modules(settings)
