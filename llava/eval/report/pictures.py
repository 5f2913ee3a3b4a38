"""Pictures of kept tokens: one image per arm, what it dropped dimmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.runner import Runner
from llava.mm_utils import process_images
from llava.pruning import PruningConfig, prune
from llava.pruning.visualize import overlay_tokens
from llava.utils import UserInputError

LABEL_HEIGHT = 22  # px above each picture
GAP = 8  # px between pictures
COLUMNS = 4


def save_overlays(runner: Runner, arms: Sequence[Arm], tokens: int, path: Path) -> None:
    """Draw what each arm keeps of one image, at the budget nearest `tokens`, to a PNG.

    It is the first image that can be read; methods that read the question read its first one.
    """
    readable = runner.first_image()
    assert readable is not None  # or no arm would have run
    (name,) = readable.names
    item = next(item for item in runner.plan.items if name in item.images)
    pruned = [arm for arm in arms if arm.method != UNPRUNED and arm.unavailable is None]
    budgets = {arm.budget for arm in pruned if arm.budget is not None}
    settings = {
        f"{arm.label} {arm.budget}": setting
        for arm in pruned
        if arm.budget == min(budgets, key=lambda budget: abs(budget - tokens))
        and (setting := arm.seeded(runner.seed)) is not None
    }
    image = runner.benchmark.load_image(name)
    draw_kept_tokens(runner.subject, image, item.question, settings, path, name)


@torch.inference_mode()
def draw_kept_tokens(
    subject: Any,
    image: Image.Image,
    question: str,
    settings: Mapping[str, PruningConfig],
    path: Path,
    name: str,
) -> None:
    """Draw `image` once per setting with what the setting drops dimmed, to a PNG.

    Args:
        subject: the loaded model.
        image: what is drawn, first with all its tokens.
        question: what methods that read the question read.
        settings: by the labels of their pictures. A setting that merges tokens, or refuses this
            image, is drawn whole and labelled so.
        path: where the picture goes.
        name: of the image.
    """
    model = subject.model
    pixels = process_images([image], subject.image_processor, model.config)
    needs = {need for setting in settings.values() for need in setting.pruner.needs}
    visual = model.encode_visual_tokens(pixels, [image.size], needs)
    pictures = {f"{name}: all {visual.embeddings(0).shape[0]}": image}
    for label, setting in settings.items():
        try:
            with prune(model, setting):
                kept = model.prune_visual_tokens(model.with_questions(visual, [question]))
        except UserInputError:
            pictures[f"{label}: refuses"] = image
            continue
        if kept.sources is not None:  # merged tokens stand for all patches at once
            pictures[f"{label}: merges all"] = image
        else:
            pictures[label] = overlay_tokens(image, kept)
    _contact_sheet(pictures).save(path)


def _contact_sheet(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Lay out labelled pictures of one size in rows."""
    width, height = next(iter(pictures.values())).size
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (width + GAP, height + LABEL_HEIGHT + GAP)
    sheet = Image.new("RGB", (GAP + columns * cell[0], GAP + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (label, picture) in enumerate(pictures.items()):
        left = GAP + position % columns * cell[0]
        top = GAP + position // columns * cell[1]
        draw.text((left, top + 4), label, fill="black", font_size=13)
        sheet.paste(picture.convert("RGB"), (left, top + LABEL_HEIGHT))
    return sheet
