"""Loading never holds the weights twice, measured as the peak of a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM

SCRIPT = Path(__file__).with_name("load_and_measure.py")
LAYERS, WIDTH = 9, 768
# What may come on top of the weights themselves: code that is first used while loading, buffers.
ALLOWANCE = 1.15

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from /proc"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random LLaVA of 330 MiB in float32, in shards of 60 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=14)
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    config = LlavaConfig(
        **{"hidden_size": WIDTH, "intermediate_size": 2048, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": 12, "vocab_size": 14000},
        **{"mm_vision_tower": "tower", "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu"},
    )
    model = LlavaLlamaForCausalLM(config)
    assert 300 < sum(p.numel() for p in model.parameters()) * 4 / 2**20 < 500
    model.save_pretrained(folder, max_shard_size="60MB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    yield folder
    shutil.rmtree(folder)


def _size(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.glob("model-*.safetensors")) / 2**20


def _measure(*arguments: object) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def _lora(checkpoint: Path, folder: Path) -> Path:
    """An adapter of all attention projections, with the projector next to it."""
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    shutil.copy(checkpoint / "config.json", folder)
    weights = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(8, WIDTH)
            weights[f"{module}.lora_B.weight"] = torch.randn(WIDTH, 8)
    save_file(weights, folder / "adapter_model.safetensors")
    shapes = {"0.weight": (WIDTH, 64), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH)}
    projector = {
        f"model.mm_projector.{name}": torch.zeros(shape)
        for name, shape in {**shapes, "2.bias": (WIDTH,)}.items()
    }
    torch.save(projector, folder / "non_lora_trainables.bin")
    return folder


def _bin(checkpoint: Path, folder: Path) -> Path:
    for file in checkpoint.glob("model-*.safetensors"):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / name)
    index = (checkpoint / "model.safetensors.index.json").read_text()
    index = index.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    shutil.copy(checkpoint / "config.json", folder)
    shutil.copytree(checkpoint / "tower", folder / "tower")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def record_peak(request: pytest.FixtureRequest) -> Callable[[dict[str, float]], None]:
    """Shown by `pytest -rP`."""
    return lambda measured: print(request.node.name, measured)


def _check(
    measured: dict[str, float], mapped: float, record: Callable[[dict[str, float]], None]
) -> None:
    ratio = measured["peak"] / (measured["model"] + mapped)
    record(measured)
    assert ratio <= ALLOWANCE, measured
    assert ratio >= 0.9, f"the weights were not read at all: {measured}"


def test_safetensors(checkpoint: Path, record_peak) -> None:
    _check(_measure(checkpoint), 0, record_peak)


def test_bin(checkpoint: Path, folder: Path, record_peak) -> None:
    _check(_measure(_bin(checkpoint, folder)), 0, record_peak)


def test_another_dtype(checkpoint: Path, record_peak) -> None:
    """The file's pages count as resident next to the converted weights until they are dropped."""
    measured = _measure(checkpoint, "--dtype", "float16")
    assert measured["model"] < 0.6 * _size(checkpoint)
    _check(measured, _size(checkpoint), record_peak)


def test_lora(checkpoint: Path, folder: Path, record_peak) -> None:
    measured = _measure(_lora(checkpoint, folder), "--base", checkpoint)
    _check(measured, 0, record_peak)


def test_two_copies_would_be_seen(checkpoint: Path) -> None:
    measured = _measure(checkpoint, "--twice")
    assert measured["peak"] / measured["model"] > 1.5 * ALLOWANCE
