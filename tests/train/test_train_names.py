"""Training starts from a model by its folder, by `~` and by its name on the hub."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.model.builder import load_pretrained_model
from llava.train.train import train

TINY = Path("playground/llava-tiny")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`start(model, output)`: one step of training on one picture; the folder it is saved in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (336, 336), "red").save(tmp_path / "0.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat   color?"},
        {"from": "gpt", "value": "red</s>  and  blue"},
    ]
    sample = [{"id": "0", "image": "0.png", "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(sample))

    def run(model: str, output: str) -> Path:
        words = ["--model_name_or_path", model, "--output_dir", f"~/{output}", "--version", "v1"]
        words += ["--data_path", str(tmp_path / "data.json"), "--image_folder", str(tmp_path)]
        words += ["--max_steps", "1", "--per_device_train_batch_size", "1", "--use_cpu"]
        words += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
        monkeypatch.setattr(sys, "argv", ["train", *words])
        train()
        return tmp_path / output

    return run


def test_training_by_every_name(start, hub, tmp_path) -> None:
    hub(TINY, "somebody/llava-tiny")
    (tmp_path / "tiny").symlink_to(TINY.absolute())
    states = []
    for number, name in enumerate((str(TINY), "~/tiny", "somebody/llava-tiny")):
        folder = start(name, f"out{number}")
        tokenizer, model, _, _ = load_pretrained_model(folder, device="cpu")
        states.append(model.state_dict())
        text = "What   color?</s>  red"
        assert (
            tokenizer(text).input_ids
            == load_pretrained_model(TINY, device="cpu")[0](text).input_ids
        )
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
