"""A handful of scenes, an untrained model, and the trainer as a function."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.train import train
from llava.train.tiny.init_tiny import can_make_tokenizer, init_language_model
from llava.train.tiny.world_data import write_conversations, write_features
from llava.world import render

SCENES = 4


@pytest.fixture(autouse=True, scope="session")
def _tokenizer_can_be_made() -> None:
    if not can_make_tokenizer():
        pytest.skip(
            f"these tests make llava-tiny's tokenizer, which sentencepiece "
            f"{sentencepiece.__version__} cannot; install 0.2.3 or newer"
        )


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tower, an untrained language model, and data of four scenes."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    CLIPVisionModel(config).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(folder / "tower")
    init_language_model(folder / "init", "tiny", seed=0)
    (folder / "data").mkdir()
    write_conversations(folder / "data/data.json", "train", SCENES, 2, turns=12, lists=True)
    write_features(folder / "data", folder / "tower", "train", SCENES, workers=0)
    for index in range(SCENES):
        target = folder / "images" / f"train/{index:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        render(f"train/{index:06d}").save(target)
    return folder


class Run(NamedTuple):
    """What a run of the trainer came to: exit code, what it wrote, its folder and its config."""

    code: int
    errors: str
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def losses(self) -> list[float]:
        log = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in log if "loss" in entry]

    def refused(self) -> str:
        """The one line of a run that was refused."""
        assert self.code == 2, self.errors
        assert "Traceback" not in self.errors
        (line,) = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture
def run_train(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Run]:
    """`run_train(samples, *arguments, base=...)` is the command, run in this process.

    `samples` are written as data; None takes those of `work`.
    """

    def run(samples: Any, *extra: str, base: Path | None = None, tower: bool = True) -> Run:
        data = work / "data" / "data.json"
        if samples is not None:
            data = tmp_path / "data.json"
            data.write_text(json.dumps(samples))
        output = tmp_path / "output"
        words = f"""train --model_name_or_path {base or work / "init"} --data_path {data}
            --image_folder {work / "images"} --output_dir {output} --max_steps 1
            --per_device_train_batch_size 2 --learning_rate 1e-3 --save_strategy no
            --logging_steps 1 --use_cpu true --seed 0"""
        towers = ["--vision_tower", str(work / "tower")] if tower else []
        monkeypatch.setattr(sys, "argv", [*words.split(), *towers, *extra])
        capsys.readouterr()
        try:
            train.main()
        except SystemExit as stop:
            return Run(int(stop.code or 0), capsys.readouterr().err, output)
        return Run(0, capsys.readouterr().err, output)

    return run
