"""Memory computed from shapes: counts of real models, bytes that autograd saves, the document."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llava.markdown import find_drift
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.train import memory
from llava.train.memory import GIB, MODELS, Shape, activation_bytes, estimate, layer_bytes
from llava.utils import UserInputError

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def test_counts_are_those_of_the_published_models() -> None:
    counts = [shape.blocks + shape.other for shape in MODELS.values()]
    assert counts == [6_738_415_616, 13_015_864_320, 7_241_732_096]
    assert [shape.projector for shape in MODELS.values()] == [20_979_712, 31_467_520, 20_979_712]


def test_counts_are_those_of_a_model_in_memory() -> None:
    config = LlavaConfig(**SMALL, mm_hidden_size=1024, mm_projector_type="mlp2x_gelu")
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
        projector = build_vision_projector(config)
    shape = Shape.of(config.to_dict())
    assert shape.blocks + shape.other == sum(
        weight.numel() for name, weight in model.named_parameters() if "mm_" not in name
    )
    assert shape.projector == sum(weight.numel() for weight in projector.parameters())
    lora = get_peft_model(
        model, LoraConfig(r=8, target_modules=r"model\.layers\..*_proj", task_type="CAUSAL_LM")
    )
    adapters = [w.numel() for name, w in lora.named_parameters() if "lora_" in name]
    assert shape.lora(8) == sum(adapters)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_layer_keeps_what_autograd_saves(groups: int) -> None:
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": groups}, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(config, 0).bfloat16()
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    states = torch.randn(2, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    angles = LlamaRotaryEmbedding(config)(states, torch.arange(32)[None].expand(2, -1))
    kept: dict[int, int] = {}
    saved = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(states, position_embeddings=angles)
    assert sum(kept.values()) == 2 * 32 * layer_bytes(Shape.of(config.to_dict()))


def test_logits_and_their_loss_are_what_a_step_peaks_at() -> None:
    trackers = pytest.importorskip("torch.distributed._tools.mem_tracker")
    config = LlamaConfig(**{**SMALL, "vocab_size": 20_000})
    model = LlamaForCausalLM(config).bfloat16()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 20_000, (2, 128), generator=torch.Generator().manual_seed(0))
    tracker = trackers.MemTracker()
    tracker.track_external(model)
    with tracker:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    peak = max(next(iter(tracker.get_tracker_snapshot("peak").values())).values())
    weights = 2 * sum(weight.numel() for weight in model.parameters())
    computed = activation_bytes(Shape.of(config.to_dict()), "finetune", ids.numel())
    assert 0.97 < computed / (peak - weights) < 1.03


def test_the_estimate_follows_its_formula() -> None:
    shape, tokens = MODELS["LLaVA-1.5-7B"], 16 * 2048
    trained = shape.blocks + shape.other + shape.projector
    whole = trained + shape.tower
    two = estimate(shape, "finetune", "zero2", 8, tokens)
    assert (two.weights, two.gradients) == (2 * whole, 2 * trained / 8)
    assert two.optimizer == 12 * trained / 8 and two.gathered == 0
    three = estimate(shape, "finetune", "zero3", 8, tokens)
    assert (three.weights, three.gathered) == (2 * whole / 8, 2e9)
    assert three.total == sum(
        (three.weights, three.gradients, three.optimizer, three.gathered, three.activations)
    )
    # One checkpoint of a layer is its input; the logits are what is largest besides.
    assert two.activations == tokens * (32 * 2 * 4096 + 12 * 32000)
    offload = estimate(shape, "finetune", "offload", 1, tokens)
    assert offload.total == offload.gathered + offload.activations
    assert estimate(shape, "pretrain", "zero2", 1, tokens).optimizer == 12 * shape.projector
    packed = estimate(shape, "qlora", "zero2", 1, tokens)
    assert 3.5 < packed.weights / GIB < 5.5
    dense = activation_bytes(shape, "finetune", tokens, checkpointing=False)
    assert dense > 32 * tokens * layer_bytes(shape)


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"config\.json has no hidden_size"):
        Shape.of({"model_type": "clip"})


def test_the_document_holds_the_computed_table() -> None:
    sections = {memory.SECTION: memory.table()}
    fix = "python -m llava.train.memory --update docs/training.md"
    assert find_drift(ROOT / "docs/training.md", sections, fix) is None
    assert "| LLaVA-1.5-13B | finetune | 16 |" in memory.table()
