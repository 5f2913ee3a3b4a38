"""Every implementation of the contract: functions that build a small model in a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from saved import KINDS, save_checkpoint
from tiny_llava import build_checkpoint

from llava.families import load
from llava.families.contract import VisionLanguageModel
from llava.families.spec import ModelSpec


def llava_15(folder: Path) -> VisionLanguageModel:
    """A LLaVA-1.5 of random weights in native format."""
    return ModelSpec(str(build_checkpoint(folder / "llava-random")), device="cpu").load()


def llava_next(folder: Path) -> VisionLanguageModel:
    """The same as a LLaVA-1.6: images in tiles, lines that end in newlines."""
    loaded = llava_15(folder)
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    model.config.image_aspect_ratio = "anyres"
    model.config.mm_patch_merge_type = "spatial_unpad"
    model.config.image_grid_pinpoints = [[336, 672], [672, 336]]
    newline = torch.randn(model.config.hidden_size, generator=generator)
    model.get_model().image_newline = torch.nn.Parameter(newline)
    return loaded


def of_family(name: str, folder: Path) -> VisionLanguageModel:
    """A tiny checkpoint of a family."""
    return load(str(save_checkpoint(name, folder / name)), device="cpu")


IMPLEMENTATIONS: dict[str, Callable[[Path], VisionLanguageModel]] = {
    "llava-1.5": llava_15,
    "llava-next": llava_next,
    **{name: partial(of_family, name) for name in KINDS},
}
