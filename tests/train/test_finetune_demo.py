"""The demo of the training scripts: its data, its table, and the tracked result in the document."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llava.markdown import find_drift
from llava.shipped import LLAVA_TINY, shipped_path
from llava.train.samples import read_samples
from llava.train.tiny.demo_data import draw
from llava.utils import UserInputError
from llava.world.splits import render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts/finetune_demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tracked(demo: ModuleType) -> dict[str, Any]:
    return json.loads((ROOT / demo.RESULT).read_text())


def test_the_document_quotes_the_tracked_result(demo: ModuleType, tracked: dict[str, Any]) -> None:
    sections = {demo.SECTION: demo.table(tracked)}
    fix = "python scripts/finetune_demo.py table --update docs/training.md"
    assert find_drift(ROOT / "docs/training.md", sections, fix) is None


def test_the_tracked_result_moved_beyond_noise(tracked: dict[str, Any]) -> None:
    assert tracked["command"] == "bash scripts/v1_5/finetune.sh --demo"
    assert tracked["git"]["commit"] and tracked["versions"]["torch"]
    pruned, unpruned = tracked["arms"]["zoo@64"], tracked["arms"]["none"]
    assert pruned["n"] == unpruned["n"] == 720
    assert pruned["low"] > 3, "what --keep-tokens-range is for"
    for row in (pruned, unpruned):
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["after"] - row["before"] == pytest.approx(row["difference"])


def test_the_table_says_what_was_not_asked(demo: ModuleType) -> None:
    row = {"n": 12, "after": 50.0}
    assert "| 64 (`zoo@64`) | - | 50.0 | - | 12 |" in demo.table({"arms": {"zoo@64": row}})
    asked = row | {"before": 40.0, "difference": 10.0, "low": -1.0, "high": 21.0}
    table = demo.table({"arms": {"none": asked}})
    assert "| all 576 | 40.0 | 50.0 | +10.0 (-1.0 to +21.0) | 12 |" in table


def test_losses_of_a_run_that_did_not_finish(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="holds no finished run; run the script again"):
        demo.losses(tmp_path)


def test_the_data_are_samples_of_new_scenes_and_parts_of_llava_tiny(tmp_path: Path) -> None:
    draw(tmp_path, scenes=9)
    chats = read_samples(str(tmp_path / "conversations.json"))
    captions = read_samples(str(tmp_path / "captions.json"))
    assert (len(chats), len(captions)) == (27, 9)
    assert sum(not chat.images for chat in chats) == 1
    shown = sorted({name for sample in (*chats, *captions) for name in sample.images})
    assert shown == [f"train/{10_000 + index:06d}.png" for index in range(9)]
    drawn = Image.open(tmp_path / "images" / shown[0])
    assert drawn.tobytes() == render(shown[0]).tobytes()

    source = load_file(shipped_path(LLAVA_TINY) / "model.safetensors")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "language-model", dtype=torch.float16)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, source[name]), name
    assert not any("mm_" in key for key in plain.config.to_dict())
    tower = load_file(tmp_path / "vision-tower/model.safetensors")
    assert len(tower) == sum("vision_tower" in name for name in source)

    # A second run keeps what is there.
    before = (tmp_path / "images" / shown[0]).stat().st_mtime_ns
    draw(tmp_path, scenes=9)
    assert (tmp_path / "images" / shown[0]).stat().st_mtime_ns == before
