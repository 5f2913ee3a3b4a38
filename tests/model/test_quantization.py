"""8-bit and 4-bit: the settings that reach transformers, and clear refusals without the means."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from llava.model import LlavaLlamaForCausalLM, builder
from llava.model.builder import load_pretrained_model
from llava.utils import UserInputError

Make = Callable[..., LlavaLlamaForCausalLM]


@pytest.fixture
def saved(small_model: Make, tmp_path: Path) -> Path:
    small_model(unfreeze_mm_vision_tower=True).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that could quantize."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(builder, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_model_is_quantized(bits: int, small_model: Make) -> None:
    """Asked of transformers' own rule: names without their `model.` would not be kept."""
    kept = builder.bits_and_bytes(bits).llm_int8_skip_modules
    model = small_model()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, kept)}
    assert converted == {name for name in linear if name.startswith("model.layers.")}
    left = set(linear) - converted
    assert {"lm_head", "model.mm_projector.0", "model.mm_projector.2"} < left
    assert any(name.startswith("model.vision_tower.") for name in left)


def test_settings_are_those_of_llava() -> None:
    four = builder.bits_and_bytes(4)
    assert four.load_in_4bit and not four.load_in_8bit
    assert four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.float16
    eight = builder.bits_and_bytes(8)
    assert eight.load_in_8bit and not eight.load_in_4bit


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
@pytest.mark.parametrize("bits", [4, 8])
def test_settings_reach_from_pretrained(
    bits: int, device: str, saved: Path, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        pass

    given: dict[str, object] = {}

    def from_pretrained(folder: Path, **kwargs: object) -> None:
        given.update(kwargs)
        raise ReachedError

    monkeypatch.setattr(builder.LlavaLlamaForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ReachedError):
        load_pretrained_model(
            str(saved), load_8bit=bits == 8, load_4bit=bits == 4, device=device, device_map="auto"
        )
    config = given["quantization_config"]
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert given["device_map"] == ({"": device} if device == "cuda:0" else "auto")
    assert given["dtype"] == torch.float16
    # removed from transformers 5: they would reach the model's constructor
    assert not {"load_in_4bit", "load_in_8bit", "load_4bit", "load_8bit"} & set(given)


@pytest.mark.parametrize("flag", ["load_8bit", "load_4bit"])
def test_refusals_name_what_is_missing(
    flag: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(device: str) -> str:
        with pytest.raises(UserInputError) as caught:
            load_pretrained_model(str(saved), device=device, **{flag: True})
        return str(caught.value)

    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refusal("cpu")
    monkeypatch.setattr(builder, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "auto"):
        assert "need a CUDA device" in refusal(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "need a CUDA device" in refusal("cpu")


def test_adapters_are_not_merged_into_quantized_weights(
    saved: Path, able: None, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    weights = {f"{module}.{side}.weight": value for side, value in factors.items()}
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(UserInputError, match=r"cannot be merged into .* save the merged model"):
        load_pretrained_model(str(folder), str(saved), load_4bit=True)


def test_attention_implementations(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eager", "sdpa"):
        _, model, _, _ = load_pretrained_model(str(saved), device="cpu", attn_implementation=name)
        assert model.config._attn_implementation == name
    monkeypatch.setattr(builder, "is_flash_attn_2_available", lambda: False)
    for arguments in ({"use_flash_attn": True}, {"attn_implementation": "flash_attention_2"}):
        with pytest.raises(UserInputError, match="install it, or use attn_implementation='sdpa'"):
            load_pretrained_model(str(saved), device="cpu", **arguments)


def test_devices(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cuda", "cpu"):
        _, model, _, _ = load_pretrained_model(str(saved), device=device)
        assert model.device.type == model.get_vision_tower().device.type == "cpu"
        assert model.dtype == torch.float32
    with pytest.raises(UserInputError, match="CUDA is not available here"):
        load_pretrained_model(str(saved), device="cuda:1")
    with monkeypatch.context() as two:
        two.setattr(torch.cuda, "is_available", lambda: True)
        two.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserInputError, match="the number of CUDA devices is 2; use 'cuda'"):
            load_pretrained_model(str(saved), device="cuda:2")
    meta = load_pretrained_model(str(saved), device="meta")[1]
    assert meta.device.type == "meta" and meta.dtype == torch.float16
