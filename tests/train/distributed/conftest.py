"""Runs of several processes and of this one, on a LLaVA of a few thousand weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from several_processes import ROOT, WORKER, Together
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.train import train
from llava.train.tiny.init_tiny import make_tokenizer

SAMPLES = 8


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of 16 patches, a language model of two layers, pictures, and eight samples.

    Every other sample has no image, so that processes see batches of either kind at once.
    """
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ).save_pretrained(folder / "tower")
    make_tokenizer(folder / "model")
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    samples = []
    noise = torch.Generator().manual_seed(0)
    for index in range(SAMPLES):
        turns = [("human", "What color?"), ("gpt", f"color number {index}")] * (1 + index // 3)
        sample = {
            "id": f"s{index}",
            "conversations": [{"from": who, "value": said} for who, said in turns],
        }
        if index % 2:
            pixels = torch.randint(256, (56 * 56 * 3,), generator=noise)
            Image.frombytes("RGB", (56, 56), bytes(pixels)).save(folder / f"images/{index}.png")
            sample["image"] = f"{index}.png"
            sample["conversations"][0]["value"] = "<image>\nWhat color?"
        samples.append(sample)
    (folder / "data.json").write_text(json.dumps(samples))
    samples[0]["image"] = "missing.png"
    samples[0]["conversations"][0]["value"] = "<image>\nWhat color?"
    (folder / "bad.json").write_text(json.dumps(samples[:2]))
    return folder


@pytest.fixture(scope="session")
def words_of(small: Path) -> Callable[..., list[str]]:
    """`words_of(output, "--flag value ...", batch=2)`: the trainer's words of a run of 4 steps."""

    def make(output: Path, extra: str, batch: int) -> list[str]:
        return f"""--model_name_or_path {small / "model"} --vision_tower {small / "tower"}
            --data_path {small / "data.json"} --image_folder {small / "images"}
            --output_dir {output} --max_steps 4 --per_device_train_batch_size {batch}
            --learning_rate 1e-3 --save_strategy no --logging_steps 1 --use_cpu true --seed 0
            --mm_projector_type mlp2x_gelu --report_to none --disable_tqdm true
            {extra}""".split()

    return make


@pytest.fixture(scope="session")
def alone(
    words_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`alone("--flag value ...")`: the folder of that run in this process, with batches of two."""
    made: dict[str, Path] = {}

    def run(extra: str, batch: int = 2) -> Path:
        if extra not in made:
            made[extra] = tmp_path_factory.mktemp("alone")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["train", *words_of(made[extra], extra, batch)])
                train.main()
        return made[extra]

    return run


@pytest.fixture(scope="session")
def together(
    words_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Together]:
    """`together({name: "--flag value ..."})`: these runs with two processes, batches of one.

    `folder` is that of an earlier launch, whose checkpoints they find.
    """

    def run(
        runs: dict[str, str], launcher: str = "torchrun", folder: Path | None = None
    ) -> Together:
        folder = folder or tmp_path_factory.mktemp("together")
        words = {name: words_of(folder / name, extra, batch=1) for name, extra in runs.items()}
        (folder / "runs.json").write_text(json.dumps(words))
        with_launcher = {
            "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2",
            "deepspeed": "-m deepspeed.launcher.runner --num_gpus 2",
            "none": "",
        }[launcher]
        done = subprocess.run(
            [sys.executable, *with_launcher.split(), WORKER, folder / "runs.json", folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Together(done.returncode, done.stderr, folder)

    return run
