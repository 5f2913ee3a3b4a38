"""The good checkpoint and picture that the cases of this folder break."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in (".", "eval")]

from bad_input_checks import World
from tiny_llava import build_checkpoint, draw_picture

from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bad-input")
    checkpoint = build_checkpoint(folder / "llava-random")
    draw_picture(0).save(folder / "scene.png")
    model = load_pretrained_model(str(checkpoint), device="cpu")[1]
    return World(folder, checkpoint, folder / "scene.png", model)
