"""LoRA and projector-only folders: merged exactly, found by their files, refused when unclear."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.utils import UserInputError

Make = Callable[..., LlavaLlamaForCausalLM]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
CLIP_Q = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {Q: (32, 32), DOWN: (32, 48), CLIP_Q: (16, 16)}
RANK, ALPHA = 4, 8


def _load(folder: Path, base: Path | None = None, **kwargs: object) -> LlavaLlamaForCausalLM:
    model_base = None if base is None else str(base)
    return load_pretrained_model(str(folder), model_base, device="cpu", **kwargs)[1]


def _logits(model: LlavaLlamaForCausalLM) -> torch.Tensor:
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9]]), images=pixels).logits


def _weights(model: LlavaLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Copies, under the names that LLaVA's files have."""
    inner = "model.vision_tower.vision_tower."
    return {
        key.replace(inner, f"{inner}vision_model."): value.clone()
        for key, value in model.state_dict().items()
    }


def _factors(modules: list[str], rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: (
            torch.randn(rank, SHAPES[name][1], generator=generator),
            torch.randn(SHAPES[name][0], rank, generator=generator),
        )
        for name in modules
    }


def _write_adapter(
    folder: Path,
    config_file: Path,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    extra: dict[str, torch.Tensor] | None = None,
    suffix: str = "safetensors",
    **settings: object,
) -> None:
    """A folder as LLaVA's LoRA training leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config_file.read_text())
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": False}
    adapter |= {"use_rslora": False, "use_dora": False, "init_lora_weights": True, "bias": "none"}
    adapter["base_model_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, **settings}))
    weights = dict(extra or {})
    for name, (a, b) in factors.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = a
        weights[f"base_model.model.{name}.lora_B.weight"] = b
    if suffix == "safetensors":
        save_file(weights, folder / "adapter_model.safetensors")
    else:
        torch.save(weights, folder / "adapter_model.bin")


@pytest.fixture
def base(small_model: Make, tmp_path: Path) -> Path:
    """A whole LLaVA whose tower lies elsewhere, as LLaVA-1.5."""
    small_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base_with_tower(small_model: Make, tmp_path: Path) -> Path:
    """A whole LLaVA that carries its tower, as LLaVA-1.6."""
    small_model(unfreeze_mm_vision_tower=True).save_pretrained(tmp_path / "base_with_tower")
    return tmp_path / "base_with_tower"


@pytest.fixture
def plain_base(tmp_path: Path) -> Path:
    """The language model alone, as vicuna is to LLaVA-1.5."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(8)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def _projector(prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {
        f"{prefix}model.mm_projector.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


SCALES: dict[str, tuple[dict[str, object], Callable[[str], float]]] = {
    "plain": ({}, lambda name: ALPHA / RANK),
    "rank-stabilised": ({"use_rslora": True}, lambda name: ALPHA / math.sqrt(RANK)),
    "alpha of one module": (
        {"alpha_pattern": {"down_proj": 3}},
        lambda name: (3 if name == DOWN else ALPHA) / RANK,
    ),
    # PEFT ignores it for nn.Linear
    "fan-in fan-out": ({"fan_in_fan_out": True}, lambda name: ALPHA / RANK),
    # the rank of the factors counts, not what the config says of other modules
    "another rank in the config": ({"r": 64}, lambda name: ALPHA / RANK),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("case", SCALES)
def test_merged_weights_are_those_of_float64(
    case: str, suffix: str, base: Path, tmp_path: Path, record_error
) -> None:
    settings, scale = SCALES[case]
    factors = _factors([Q, DOWN])
    _write_adapter(tmp_path / "lora", base / "config.json", factors, suffix=suffix, **settings)
    before, after = _weights(_load(base)), _weights(_load(tmp_path / "lora", base))
    assert set(before) == set(after)
    for key, value in after.items():
        name = key.removesuffix(".weight")
        if name not in factors:
            assert torch.equal(value, before[key])
            continue
        a, b = factors[name]
        wanted = before[key].double() + scale(name) * (b.double() @ a.double())
        error = ((value - wanted).abs().max() / wanted.abs().max()).item()
        record_error("lora: merged weights, relative", error)
        assert error <= 1e-6
        assert (value - before[key]).abs().max() > 0.1


def test_half_precision_is_rounded_once(base: Path, tmp_path: Path) -> None:
    factors = _factors([Q])
    _write_adapter(tmp_path / "lora", base / "config.json", factors)
    before = _load(base, dtype=torch.bfloat16).get_submodule(Q).weight
    after = _load(tmp_path / "lora", base, dtype=torch.bfloat16).get_submodule(Q).weight
    a, b = factors[Q]
    wanted = before.double() + ALPHA / RANK * (b.double() @ a.double())
    assert after.dtype == torch.bfloat16
    # half a unit in the last place of bfloat16 (8 bits), and a little for the float32 product
    assert ((after.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("prefix", ["base_model.", "base_model.model.", ""])
def test_projector_trained_beside_the_adapter(
    prefix: str, plain_base: Path, base: Path, tmp_path: Path
) -> None:
    """The usual release: a plain language model, adapter, and the projector in a third file."""
    _write_adapter(tmp_path / "lora", base / "config.json", _factors([Q]))
    with pytest.raises(UserInputError, match=r"4 missing weights, .*mm_projector"):
        _load(tmp_path / "lora", plain_base)
    torch.save(_projector(prefix), tmp_path / "lora" / "non_lora_trainables.bin")
    model = _load(tmp_path / "lora", plain_base)
    weights = _weights(model)
    for key, value in _projector().items():
        assert torch.equal(weights[key], value)
    language = load_file(plain_base / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], language["lm_head.weight"])
    assert not torch.equal(weights[f"{Q}.weight"], language[f"{Q}.weight"])
    # a whole model, that needs neither adapter nor base any more
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(_logits(_load(tmp_path / "merged")), _logits(model))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_adapters_of_the_tower(
    carried: bool, flat: bool, base: Path, base_with_tower: Path, tmp_path: Path
) -> None:
    """Leaf names like q_proj fit CLIP too: such adapters belong to the tower, wherever it lies."""
    base = base_with_tower if carried else base
    factors = _factors([Q, CLIP_Q])
    written = {(k.replace("vision_model.", "") if flat else k): v for k, v in factors.items()}
    _write_adapter(tmp_path / "lora", base / "config.json", written)
    before, model = _weights(_load(base)), _load(tmp_path / "lora", base)
    a, b = factors[CLIP_Q]
    wanted = before[f"{CLIP_Q}.weight"].double() + ALPHA / RANK * (b.double() @ a.double())
    assert torch.allclose(_weights(model)[f"{CLIP_Q}.weight"].double(), wanted, atol=1e-5)
    # The tower is no longer the stock one: it is saved, and the original code is told to use it.
    model.save_pretrained(tmp_path / "merged")
    assert f"{CLIP_Q}.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["unfreeze_mm_vision_tower"] is True
    assert torch.equal(_logits(_load(tmp_path / "merged")), _logits(model))


def test_adapter_that_spares_the_tower_leaves_it_where_it_is(base: Path, tmp_path: Path) -> None:
    _write_adapter(tmp_path / "lora", base / "config.json", _factors([Q]))
    _load(tmp_path / "lora", base).save_pretrained(tmp_path / "merged")
    assert not any("vision_tower" in k for k in load_file(tmp_path / "merged/model.safetensors"))


def test_weights_trained_as_a_whole(base: Path, tmp_path: Path) -> None:
    """PEFT's modules_to_save, and its keys with the adapter's name in them."""
    head, norm = torch.randn(64, 32), torch.randn(32)
    extra = {
        "base_model.model.lm_head.modules_to_save.weight": head,
        "base_model.model.model.norm.weight": norm,
    }
    a, b = _factors([Q])[Q]
    extra[f"base_model.model.{Q}.lora_A.default.weight"] = a
    extra[f"base_model.model.{Q}.lora_B.default.weight"] = b
    _write_adapter(tmp_path / "lora", base / "config.json", {}, extra)
    before, after = _weights(_load(base)), _weights(_load(tmp_path / "lora", base))
    assert torch.equal(after["lm_head.weight"], head)
    assert torch.equal(after["model.norm.weight"], norm)
    wanted = before[f"{Q}.weight"] + ALPHA / RANK * b @ a
    assert torch.allclose(after[f"{Q}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "base_model.", "anything.at.all."])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_projector_only(
    suffix: str, prefix: str, plain_base: Path, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    if suffix == "bin":
        torch.save(_projector(prefix), folder / "mm_projector.bin")
    else:
        save_file(_projector(prefix), folder / "mm_projector.safetensors")
    for language in (plain_base, base):
        weights = _weights(_load(folder, language))
        assert all(torch.equal(weights[key], value) for key, value in _projector().items())
        wanted = load_file(language / "model.safetensors")["lm_head.weight"]
        assert torch.equal(weights["lm_head.weight"], wanted)
    pruned = _load(folder, plain_base, pruning={"method": "zoo", "keep_tokens": 2})
    assert _logits(pruned).shape[1] == 3 + 2


def test_embeddings_saved_with_the_projector(plain_base: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    table = torch.randn(64, 32)
    weights = {**_projector(), "model.embed_tokens.weight": table}
    torch.save(weights, folder / "mm_projector.bin")
    assert torch.equal(_load(folder, plain_base).get_input_embeddings().weight, table)


def test_whole_checkpoint_with_a_projector_file_beside_it(base: Path) -> None:
    """liuhaotian/llava-v1.5-7b lists mm_projector.bin too: the weights of the model count."""
    wanted = _logits(_load(base))
    torch.save(_projector(), base / "mm_projector.bin")
    assert torch.equal(_logits(_load(base)), wanted)


def test_pruning_and_config_are_those_of_the_part(plain_base: Path, base: Path, tmp_path: Path):
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "llava", "mm_token_pruning": {"method": "zoo", "keep_tokens": 2}}
    changed = tmp_path / "config.json"
    changed.write_text(json.dumps(config))
    _write_adapter(tmp_path / "lora", changed, _factors([Q]))
    torch.save(_projector("base_model.model."), tmp_path / "lora" / "non_lora_trainables.bin")
    model = _load(tmp_path / "lora", plain_base)
    assert model.pruning.method == "zoo" and _logits(model).shape[1] == 3 + 2
