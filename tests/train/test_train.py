"""The trainer end to end on a handful of scenes: cached features, pixels, resume, package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig

from llava.model.builder import load_pretrained_model
from llava.train.arguments import ModelArguments
from llava.train.parts import load_start
from llava.train.tiny.package import package
from llava.train.tiny.patch_labels import CLASSES, IGNORE, patch_labels
from llava.train.tiny.tower import DenseTower, SceneDataset, tower_loss
from llava.train.tiny.world_data import write_conversations
from llava.world import render, scene


def run_command(work: Path, output: str, steps: int, *extra: str) -> subprocess.CompletedProcess:
    command = f"""-m llava.train.train --model_name_or_path {work}/init --version v1
        --vision_tower {work}/tower --data_path {work}/data/data.json --output_dir {work}/{output}
        --max_steps {steps} --per_device_train_batch_size 2 --learning_rate 1e-3 --save_steps 2
        --save_total_limit 1 --logging_steps 1 --report_to none --use_cpu true --seed 0"""
    return subprocess.run(
        [sys.executable, *command.split(), *extra], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    done = run_command(work, "model", 4, "--feature_file", f"{work}/data/features.npy")
    assert done.returncode == 0, done.stderr[-2000:]
    return work / "model"


def test_training_lowers_the_loss_and_moves_the_projector(work: Path, trained: Path) -> None:
    state = json.loads(next(trained.glob("checkpoint-4/trainer_state.json")).read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]


def test_pixels_and_cached_features_train_alike(trained: Path, run_train: Callable) -> None:
    done = run_train(None)
    assert done.code == 0, done.errors
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    # cached features are float16
    assert done.losses[0] == pytest.approx(log[0]["loss"], abs=2e-3)


def test_one_conversation_of_questions_in_25_shows_no_image(tmp_path: Path) -> None:
    path = tmp_path / "finetune.json"
    write_conversations(path, "train", scenes=10, variants=5, turns=6, lists=False)
    samples = json.loads(path.read_text())
    blind = [number for number, sample in enumerate(samples) if "image" not in sample]
    assert blind == [24, 49]
    for sample in samples:
        openings = [turn["value"] for turn in sample["conversations"] if turn["from"] == "human"]
        marks = [opening.startswith("<image>") for opening in openings]
        assert marks == ["image" in sample] + [False] * (len(openings) - 1)


def test_a_killed_run_continues(work: Path, run_train: Callable) -> None:
    words = ("--feature_file", f"{work}/data/features.npy", "--save_strategy", "steps")
    assert run_train(None, *words, "--save_steps", "2", "--max_steps", "2").code == 0
    done = run_train(None, *words, "--save_steps", "2", "--max_steps", "4")
    assert done.code == 0, done.errors
    state = json.loads((done.folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert [e["step"] for e in state["log_history"] if "loss" in e] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--version", "v9"), "unknown template"),
        (("--data_path", "missing.json"), "cannot read --data_path"),
        (("--parallel_turns", "2"), "--parallel_turns is 2.0"),
    ],
)
def test_bad_input_is_one_line(extra: tuple[str, ...], message: str, run_train: Callable) -> None:
    assert message in run_train(None, *extra).refused()


def test_the_command_ends_with_one_line_and_2(work: Path) -> None:
    done = run_command(work, "bad", 1)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the samples name images; give --image")
    assert "Traceback" not in done.stderr


def test_the_package_loads_and_answers_like_the_trained_model(work: Path, trained: Path) -> None:
    package(trained, work / "init", work / "packed")
    tokenizer, model, processor, _ = load_pretrained_model(str(work / "packed"), device="cpu")
    assert model.config.mm_conv_mode == "vicuna_v1"
    assert model.get_vision_tower().from_checkpoint
    pixels = processor.preprocess(render("train/000000"), return_tensors="pt")["pixel_values"]
    features = model.get_vision_tower()(pixels)
    cached = np.load(work / "data" / "features.npy")[0]
    assert torch.allclose(features[0], torch.from_numpy(cached).float(), atol=2e-2)
    assert tokenizer.bos_token_id == model.config.bos_token_id


def test_patch_labels_name_what_is_drawn() -> None:
    made = scene("train/000000")
    labels = patch_labels(made)
    assert set(labels) == set(CLASSES)
    foreground = 4 * len(made.items) + 2 * sum(len(sign.text) for sign in made.signs)
    assert int((labels["shape"] > 0).sum()) == foreground
    assert int((labels["corner"] == 1).sum()) == len(made.items)
    for name, values in labels.items():
        assert values.max() < CLASSES[name] and values.min() >= IGNORE


def test_neighbour_labels_show_the_partner_and_skip_the_thing_itself() -> None:
    made = scene("train/000000")
    labels = patch_labels(made)
    sides = {"above": "up", "below": "down", "left": "left", "right": "right"}
    seen = 0
    for item in made.items:
        own = labels["shape"][item.row, item.column]
        block = slice(item.row, item.row + 2), slice(item.column, item.column + 2)
        assert all((labels[side][block] != own).all() for side in sides.values())
        if item.partner is not None:
            other = made.items[item.partner]
            partner = labels["shape"][other.row, other.column]
            assert (labels[sides[item.partner_side]][block] == partner).sum() == 2
            seen += 1
    assert seen > 0


def test_a_trained_model_takes_another_tower(work: Path, trained: Path) -> None:
    shutil.copytree(work / "tower", work / "other-tower")
    model = load_start(
        ModelArguments(str(trained), vision_tower=str(work / "other-tower")), torch.float32
    )
    assert model.get_vision_tower().vision_tower_name == str(work / "other-tower")
    assert model.config.mm_vision_tower == str(work / "other-tower")


def test_the_tower_starts_by_looking_at_neighbours_and_has_finite_gradients() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    tower = DenseTower(config)
    pixels, labels, present = SceneDataset(0, 1)[0]
    states = tower.clip.embeddings((pixels[None] - tower.image_mean) / tower.image_std)
    block = tower.clip.encoder.layers[0]
    states = block.layer_norm1(tower.clip.pre_layrnorm(states))
    query, key = (
        layer(states).view(577, 4, 32).transpose(0, 1)
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    best = (query @ key.transpose(1, 2))[:, 1:, 1:].argmax(-1).view(4, 24, 24)
    here = torch.arange(576).view(24, 24)
    assert (best[0, 1:] == here[:-1]).float().mean() > 0.75  # up
    assert (best[1, :-1] == here[1:]).float().mean() > 0.75  # down
    assert (best[2, :, 1:] == here[:, :-1]).float().mean() > 0.75  # left
    assert (best[3, :, :-1] == here[:, 1:]).float().mean() > 0.75  # right

    logits, whole = tower(pixels[None])
    tower_loss(logits, whole, {k: v[None] for k, v in labels.items()}, present[None]).backward()
    grads = [p.grad for p in tower.heads.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
