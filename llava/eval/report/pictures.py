"""Pictures of kept tokens: one image per arm, what it dropped dimmed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.runner import Runner
from llava.pruning.visualize import overlay_tokens
from llava.utils import UserInputError

LABEL_HEIGHT = 22  # px above each picture
GAP = 8  # px between pictures
COLUMNS = 4


def save_overlays(runner: Runner, arms: Sequence[Arm], tokens: int, path: Path) -> None:
    """Draw what each arm keeps of one image, at the budget nearest `tokens`, to a PNG."""
    pruned = [arm for arm in arms if arm.method != UNPRUNED and arm.unavailable is None]
    budgets = {arm.budget for arm in pruned if arm.budget is not None}
    nearest = min(budgets, key=lambda budget: abs(budget - tokens), default=None)
    shown = {f"{arm.label} {arm.budget}": arm for arm in pruned if arm.budget == nearest}
    draw_kept_tokens(runner, shown, path)


@torch.inference_mode()
def draw_kept_tokens(runner: Runner, arms: Mapping[str, Arm], path: Path) -> bool:
    """Draw an image once per arm with what the arm drops dimmed, to a PNG.

    It is the first image that can be read; methods that read the question read its first one.

    Args:
        runner: with the loaded model and the questions.
        arms: by the labels of their pictures. One that merges tokens, or refuses this image, is
            drawn whole and labelled so; and so is one of a model whose tokens do not say what part
            of the image they show. One that drops tokens between layers is drawn with what goes
            into the first of them.
        path: where the picture goes.

    Returns:
        Whether an image can be read.
    """
    images = runner.first_image()
    if images is None:
        return False
    (name,) = images.names
    item = next(item for item in runner.plan.items if name in item.images)
    image = runner.benchmark.load_image(name)
    visual = runner.encode(images, arms.values())
    pictures = {f"{name}: all {visual.embeddings(0).shape[0]}": image}
    for title, arm in arms.items():
        label = title if arm.decoder is None else f"{title}: before its layers"
        try:
            kept = runner.prune_images(visual, arm, [item.question])
            kept.settle()
        except UserInputError:
            pictures[f"{label}: refuses"] = image
            continue
        if kept.sources is not None:  # a merged token shows all patches at once
            pictures[f"{label}: merges all"] = image
            continue
        try:
            pictures[label] = overlay_tokens(image, kept)
        except UserInputError:  # models whose tokens do not say what part they show
            pictures[f"{label}: place unknown"] = image
    _contact_sheet(pictures).save(path)
    return True


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
