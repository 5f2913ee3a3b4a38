"""What each row of a table keeps of one image, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.eval.arm_words import parse_arm
from llava.eval.engine.request import UNPRUNED
from llava.eval.report.paper_table import budget_text
from llava.eval.report.pictures import contact_sheet
from llava.eval.tables.fill import Filled, FilledRow
from llava.eval.tables.plan import DEFAULT_PROTOCOL, Setting
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, prune
from llava.pruning.visualize import overlay_tokens
from llava.utils import UserInputError


def rows_to_draw(filled: Filled) -> list[FilledRow]:
    """The available rows at the smallest budget, as the model was trained to read images.

    Numbers of tokens and shares of them each have a smallest one.
    """
    rows = [
        row
        for row in filled.rows
        if row.unavailable is None
        and row.row.method != UNPRUNED
        and row.next_protocol == DEFAULT_PROTOCOL
        and row.budget is not None
    ]
    drawn = []
    for row in rows:
        others = [r.budget for r in rows if isinstance(r.budget, type(row.budget))]
        if row.budget == min(others):
            drawn.append(row)
    return drawn


def draw_kept_tokens(
    filled: Filled,
    model_path: str,
    image: Image.Image,
    question: str,
    path: Path,
    *,
    model_base: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> bool:
    """Draw `image` once per row with what the row dropped dimmed, to a PNG; False without rows.

    Methods that read the question read `question`. A row that merges tokens, or refuses this image,
    is drawn whole and labelled so.
    """
    rows = rows_to_draw(filled)
    if not rows:
        return False
    _, model, processor, _ = load_pretrained_model(model_path, model_base, device=device)
    model.pruning = None
    settings = [(row, Setting(row.row.method, row.budget, row.row.options)) for row in rows]
    # As the runs read them, which draw at random from the same seed.
    configs = [parse_arm(setting.word).pruning(seed) for _, setting in settings]
    visual = _encode(model, processor, image, question, configs)
    pictures = {"all tokens": image}
    for (row, setting), config in zip(settings, configs, strict=True):
        label = f"{row.row.label} {budget_text(setting.budget)}"
        try:
            with torch.inference_mode(), prune(model, config):
                kept = model.prune_visual_tokens(model.with_questions(visual, [question]))
        except UserInputError:
            pictures[f"{label}: refuses"] = image
            continue
        if kept.sources is not None:  # merged tokens stand for all patches at once
            pictures[f"{label}: merges all"] = image
        else:
            pictures[label] = overlay_tokens(image, kept)
    contact_sheet(pictures, path)
    return True


@torch.inference_mode()
def _encode(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    configs: Sequence[PruningConfig | None],
) -> Any:
    """Visual tokens of the image, with what any of the settings needs."""
    pixels = process_images([image], processor, model.config)
    needs = {need for config in configs if config for need in config.pruner.needs}
    return model.encode_visual_tokens(pixels, [image.size], needs)
