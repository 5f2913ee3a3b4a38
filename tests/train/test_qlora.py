"""A LoRA on a language model of 4 or 8 bits trains, on the CPU too, and fits the unpacked base."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.model.builder import load_pretrained_model
from llava.train import train
from llava.train.arguments import parse_arguments
from llava.train.parts import build_model

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which scripts/test.sh --deepspeed installs",
)
RANK, ALPHA, STEPS = 8, 16, 10
LINEAR = 7  # of each layer of the decoder
PACKED = {4: ("Linear4bit", torch.uint8), 8: ("Linear8bitLt", torch.int8)}


class Trained(NamedTuple):
    """A finished run, its LLaVA, and the parameters that this started with."""

    run: Any
    llava: nn.Module
    start: dict[str, Tensor]


@pytest.fixture
def train_qlora(run_train: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """`train_qlora(bits, "--flag value ...")` trains ten steps."""

    def run(bits: int, extra: str = "", **options: Any) -> Trained:
        kept: list[Any] = []

        def build(arguments: Any) -> Any:
            built = make(arguments)
            start = {name: weight.detach().clone() for name, weight in built[1].named_parameters()}
            kept.extend((built[1], start))
            return built

        make = train.build_model
        monkeypatch.setattr(train, "build_model", build)
        words = f"""--lora_enable True --lora_r {RANK} --lora_alpha {ALPHA} --lora_dropout 0
            --bits {bits} --max_steps {STEPS} {extra}"""
        done = run_train(None, *words.split(), **options)
        assert done.code == 0, done.errors
        return Trained(done, *kept)

    return run


def check_training(bits: int, trained: Trained) -> None:
    """What a run must have changed, and left as it was."""
    losses = trained.run.losses
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.3
    weights = dict(trained.llava.named_parameters())
    changed = {name for name in weights if not torch.equal(weights[name], trained.start[name])}
    expected = {name for name in weights if "lora_" in name or "mm_projector" in name}
    assert changed == expected
    kind, dtype = PACKED[bits]
    parts = dict(trained.llava.named_modules())
    packed = [
        name
        for name, part in parts.items()
        if type(part).__name__ == kind and name.endswith(".base_layer")
    ]
    assert len(packed) == LINEAR * trained.llava.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in packed)
    assert {weights[f"{name}.weight"].dtype for name in packed} == {dtype}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("extra", ["", "--gradient_checkpointing True --bf16 True"])
def test_only_adapters_and_projector_change(
    bits: int, extra: str, train_qlora: Callable[..., Trained]
) -> None:
    trained = train_qlora(bits, extra)
    check_training(bits, trained)
    parts = trained.llava.modules()
    assert any(getattr(part, "gradient_checkpointing", False) for part in parts) == bool(extra)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_saved_fits_the_base_as_it_was_before_packing(
    bits: int, work: Path, train_qlora: Callable[..., Trained]
) -> None:
    trained = train_qlora(bits)
    folder = trained.run.folder
    assert "quantization_config" not in trained.run.config
    _, loaded, _, _ = load_pretrained_model(str(folder), str(work / "init"), device="cpu")
    assert not getattr(loaded, "is_quantized", False)
    own = dict(trained.llava.named_parameters())
    found = loaded.state_dict()
    for name, value in trained.llava.get_model().mm_projector.named_parameters():
        assert torch.equal(found[f"model.mm_projector.{name}"], value)
    name = "model.layers.1.mlp.down_proj"
    low, high = (own[f"{name}.lora_{side}.default.weight"].detach() for side in "AB")
    added = ALPHA / RANK * (high @ low)
    start = load_file(work / "init/model.safetensors")[f"{name}.weight"]
    assert added.abs().max() > 1e-3
    torch.testing.assert_close(found[f"{name}.weight"] - start, added, atol=1e-6, rtol=0)


@pytest.fixture
def build(work: Path, tmp_path: Path) -> Callable[..., Any]:
    """`build("--flag value ...", base=...)`: the LLaVA that a run of these arguments trains."""

    def make(words: str, base: str | Path = work / "init") -> Any:
        line = f"""--model_name_or_path {base} --data_path {work / "data/data.json"}
            --output_dir {tmp_path / "out"} --use_cpu True --lora_enable True --lora_r 2 {words}"""
        return build_model(parse_arguments(line.split()))[1]

    return make


@pytest.mark.parametrize(
    ("words", "kind", "nested", "dtype"),
    [
        ("", "nf4", True, torch.float32),
        ("--quant_type fp4", "fp4", True, torch.float32),
        ("--double_quant False", "nf4", False, torch.float32),
        ("--bf16 True", "nf4", True, torch.bfloat16),
    ],
)
def test_four_bits_are_packed_as_asked(
    words: str, kind: str, nested: bool, dtype: torch.dtype, work: Path, build: Callable[..., Any]
) -> None:
    layer = build(f"--bits 4 --vision_tower {work / 'tower'} {words}").model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested) == (kind, nested)
    assert layer.base_layer.compute_dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_a_llava_keeps_projector_and_tower_unpacked(bits: int, build: Callable[..., Any]) -> None:
    llava = build(f"--bits {bits}", "playground/llava-tiny")
    inner = llava.get_model()
    for part in (inner.mm_projector, inner.vision_tower, llava.lm_head):
        assert all(weight.is_floating_point() for weight in part.parameters())
    assert inner.layers[0].mlp.up_proj.weight.dtype == PACKED[bits][1]
    start = load_file("playground/llava-tiny/model.safetensors")
    for name, weight in inner.mm_projector.named_parameters():
        assert torch.equal(weight, start[f"model.mm_projector.{name}"].float())
