"""Checkpoints, configs and benchmarks that are damaged, incomplete or of something else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_input_checks import ANSWER, QUESTION, World, needed, one_line, refused
from safetensors.torch import load_file, save_file
from tiny_llava import write_lines

from llava.eval import __main__ as eval_command
from llava.eval import run_llava
from llava.model.builder import load_pretrained_model
from llava.serve import cli


def config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": SimpleNamespace()}, folder / "pytorch_model.bin")


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mm_vision_tower": None}
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "config cut": (cut("config.json"), r"config\.json is damaged, it is not JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights"),
    "weights cut": (cut("model.safetensors"), r"model\.safetensors.* is damaged"),
    "weight missing": (without_a_weight, r"missing weights, for example 'model\.norm\.weight'"),
    "shard missing": (without_a_shard, r"model-00001-of-00002\.safetensors.*missing"),
    "code in weights": (pickled, r"pytorch_model\.bin.* not a plain weight file"),
    "other model": (config(**QWEN), r"Qwen2ForCausalLM"),
    "other sizes": (config(hidden_size=64, head_dim=32), r"mismatched weights"),
    "no tower": (lambda f: shutil.rmtree(f / "tower"), r"tower"),
    "tokenizer cut": (cut("tokenizer.model"), r"tokenizer .* cannot be read"),
    "length": (config(tokenizer_model_max_length="x"), r"max_length .* is 'x'; give the longest"),
    "no length": (config(tokenizer_model_max_length=0), r"max_length .* is 0; give the longest"),
    "true length": (config(tokenizer_model_max_length=True), r"max_length .* is True; give"),
    "broken length": (config(tokenizer_model_max_length=9.5), r"max_length .* is 9\.5; give"),
    "padding": (config(tokenizer_padding_side="both"), r"padding_side .* is 'both'; use one of"),
    "aspect number": (config(image_aspect_ratio=3), r"aspect_ratio .* is 3; use one of pad, any"),
    "aspect word": (config(image_aspect_ratio="padd"), r"aspect_ratio .* is 'padd'; use one of"),
    "template": (
        config(mm_conv_mode="v2"),
        r"mm_conv_mode 'v2' .* not a known template; use one of",
    ),
    "template number": (config(mm_conv_mode=[1]), r"mm_conv_mode \[1\] .* use one of"),
    "pruning word": (config(mm_token_pruning="zoo"), r"mm_token_pruning .*: .* got 'zoo'; correct"),
    "pruning key": (
        config(mm_token_pruning={"method": "zoo", "keep_token": 3}),
        r"mm_token_pruning in config\.json cannot be used: .* did you mean 'keep_tokens'",
    ),
    "canvases": (
        config(image_aspect_ratio="anyres", image_grid_pinpoints="[[336]]"),
        r"image_grid_pinpoints is '\[\[336\]\]'; give canvases",
    ),
    "canvas sides": (
        config(image_aspect_ratio="anyres", image_grid_pinpoints=[[336, 500]]),
        r"image_grid_pinpoints .* not multiples of .* 336 pixels",
    ),
    "protocol": (config(mm_next_protocol="fixed"), r"mm_next_protocol is 'fixed'; use one of"),
    "layer": (config(mm_vision_select_layer=-4), r"mm_vision_select_layer -4 does not exist"),
    "layer word": (config(mm_vision_select_layer="x"), r"mm_vision_select_layer 'x' does not"),
    "feature": (config(mm_vision_select_feature="cls"), r"unknown mm_vision_select_feature 'cls'"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(world: World, name: str) -> None:
    damage, pattern = CHECKPOINTS[name]
    folder = world.broken(f"broken {name}", damage)
    refused(lambda: load_pretrained_model(folder, device="cpu"), pattern)


def without_tower(folder: Path) -> None:
    config(mm_vision_tower=None)(folder)
    weights = load_file(folder / "model.safetensors")
    text = {k: v for k, v in weights.items() if "vision_tower" not in k and "projector" not in k}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})


INCOMPLETE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        0,
        r"mute has no tokenizer, .*; put the tokenizer\.model or",
    ),
    "tower": (without_tower, 2, r"mute is not a LLaVA model: it has no vision tower; give"),
}


@pytest.mark.parametrize("missing", INCOMPLETE)
@pytest.mark.parametrize("command", [cli, run_llava, eval_command], ids=["chat", "run", "eval"])
def test_incomplete_models_are_loaded_but_not_asked(
    world: World, tmp_path: Path, command: Any, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, result, pattern = INCOMPLETE[missing]
    folder = tmp_path / "mute"
    shutil.copytree(world.checkpoint, folder)
    damage(folder)
    assert load_pretrained_model(str(folder), device="cpu")[result] is None
    capsys.readouterr()
    words = ["--model-path", str(folder)]
    if command is eval_command:
        write_lines(tmp_path / "questions.jsonl", [QUESTION])
        write_lines(tmp_path / "answers.jsonl", [ANSWER])
        words = ["quickstart", *words, "--benchmark", str(tmp_path)]
        words += ["--image-folder", str(world.folder), "--output", str(tmp_path / "out")]
    words += needed(command, world, words)
    line = one_line(lambda: command.main(words), capsys)
    assert re.search(pattern, line), line


@pytest.mark.parametrize("command", [cli, run_llava], ids=["chat", "run"])
def test_models_that_write_captions_are_not_asked(
    world: World, tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "captions"
    shutil.copytree(world.checkpoint, folder)
    config(mm_conv_mode="plain")(folder)
    line = one_line(
        lambda: command.main(
            ["--model-path", str(folder), *needed(command, world, ["--model-path"])]
        ),
        capsys,
    )
    wanted = r"template 'plain' is for captions, not for a chat; use another --conv-mode"
    assert re.search(wanted, line)


# --- benchmarks ---

BENCHMARKS: dict[str, tuple[dict[str, str], str]] = {
    "no questions": ({"questions.jsonl": ""}, r"has no questions"),
    "no JSON": ({"questions.jsonl": "{question"}, r"line 1 of .*questions\.jsonl is damaged"),
    "no objects": ({"questions.jsonl": "[1]"}, r"line 1 of .*questions\.jsonl is not a JSON"),
    "no text": ({"questions.jsonl": '{"question_id": 1, "image": "a"}'}, r"line 1 .* lacks text"),
    "no answer": ({"answers.jsonl": ""}, r"has no answer to question 1"),
    "no manifest": ({}, r"cannot read .*manifest\.json"),
    "odd manifest": ({"manifest.json": "3"}, r"manifest\.json must list hashes"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks(
    world: World, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, pattern = BENCHMARKS[name]
    write_lines(tmp_path / "questions.jsonl", [QUESTION])
    write_lines(tmp_path / "answers.jsonl", [ANSWER])
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    words = ["--model-path", str(world.checkpoint), "--benchmark", str(tmp_path)]
    words += ["--output", str(tmp_path / "out")]
    line = one_line(lambda: eval_command.main(["quickstart", *words]), capsys)
    assert re.search(pattern, line), line


@pytest.mark.parametrize(("damaged", "pattern"), [(True, "cut short"), (False, "cannot read")])
def test_pictures_of_a_benchmark(
    world: World,
    tmp_path: Path,
    damaged: bool,
    pattern: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lines(tmp_path / "questions.jsonl", [QUESTION])
    write_lines(tmp_path / "answers.jsonl", [ANSWER])
    if damaged:
        (tmp_path / "scene.png").write_bytes(world.picture.read_bytes()[:600])
    words = ["--model-path", str(world.checkpoint), "--benchmark", str(tmp_path)]
    words += ["--image-folder", str(tmp_path), "--output", str(tmp_path / "out")]
    line = one_line(lambda: eval_command.main(["quickstart", *words]), capsys)
    assert re.search(pattern, line), line
