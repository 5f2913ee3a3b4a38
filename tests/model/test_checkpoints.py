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
    model.get_model().initialize_vision_modules(
        SimpleNamespace(
            vision_tower=str(tmp_path / "tower"),
            mm_vision_select_layer=-2,
            pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"),
        )
    )
    assert model.get_model().mm_projector.weight.eq(1).all()
    assert model.config.mm_hidden_size == 16 and model.config.mm_projector_type == "linear"
    assert _logits(model).shape == (1, 7, 64)
    model.save_pretrained(tmp_path / "llava")
    assert torch.equal(_logits(_load(tmp_path / "llava")), _logits(model))
    with pytest.raises(UserInputError, match="plain language model without a vision tower"):
        _load(tmp_path / "base")


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage_bin(folder: Path) -> None:
    _remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")


def _code_in_bin(folder: Path) -> None:
    _remove_weights(folder)
    torch.save({"lm_head.weight": Path("x")}, folder / "pytorch_model.bin")


def _missing_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    _remove_weights(folder)
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lose(part: str) -> Callable[[Path], None]:
    return lambda folder: _rename_weights(folder, lambda k: None if part in k else k)


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: _edit_config(folder, **changes)


_MPT = {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}
_HF = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
DAMAGES = {
    "no weights": (_remove_weights, "holds no weights"),
    "truncated": (_truncate_weights, "model.safetensors' is damaged"),
    "garbage": (_garbage_bin, "pytorch_model.bin' is"),
    "pickled code": (_code_in_bin, "use a safetensors file or a .bin file that holds tensors"),
    "missing shard": (_missing_shard, "names 'model-00001-of-00001.safetensors', which is missing"),
    "no projector": (_lose("mm_projector.0"), "2 missing weights, for example 'model.mm_projector"),
    "no head": (_lose("lm_head"), "1 missing weights, for example 'lm_head.weight'"),
    "half a tower": (_lose("layers.1.mlp.fc1"), "2 missing weights, for example 'model.vision"),
    "more layers": (_config(num_hidden_layers=1), "9 unexpected weights"),
    "other sizes": (_config(mm_projector_type="linear"), "missing weights"),
    "other vocabulary": (_config(vocab_size=70), "2 mismatched weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json' cannot be read"),
    "mpt": (_config(**_MPT), "holds LlavaMptForCausalLM"),
    "converted": (_config(**_HF, mm_vision_tower="absent"), "not LlavaLlamaForCausalLM; give"),
    "anyres": (_config(image_aspect_ratio="anyres_max_9"), "is of a LLaVA after 1.6"),
    "spatial": (_config(mm_patch_merge_type="unpad_pool"), "is of a LLaVA after 1.6"),
    "no newline": (_config(mm_patch_merge_type="spatial_unpad"), "'model.image_newline'"),
    "lost tower": (_config(mm_vision_tower="nowhere/at/all"), "cannot find the vision tower"),
    "projector": (_config(mm_projector_type="cube"), "unknown mm_projector_type 'cube'"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_clear_error(damage: str, saved: Path) -> None:
    act, message = DAMAGES[damage]
    act(saved)
    with pytest.raises(UserInputError) as caught:
        _load(saved)
    assert message in str(caught.value)
    assert ";" in str(caught.value) or ". " in str(caught.value), "says no remedy"


def test_one_clear_error_for_arguments(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="is not a checkpoint folder"):
        _load(tmp_path / "typo")
    with pytest.raises(UserInputError, match="8-bit and 4-bit"):
        _load(saved, load_4bit=True)
    with pytest.raises(UserInputError, match="model_base is for LoRA"):
        _load(saved, model_base="some/base")
    projector_only = tmp_path / "projector"
    projector_only.mkdir()
    (projector_only / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(UserInputError, match="holds only a projector"):
        _load(projector_only)
    with pytest.raises(ValueError, match="sieve"):
        _load(saved, pruning={"method": "sieve", "keep_tokens": 2})
