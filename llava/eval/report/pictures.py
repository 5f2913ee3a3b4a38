"""One benchmark image per method, with the patches that the method removed dimmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.runner import Runner
from llava.pruning.visualize import overlay_tokens

LABEL_HEIGHT = 22  # px above each picture
GAP = 8  # px between pictures


def save_overlays(runner: Runner, arms: Sequence[Arm], tokens: int, path: Path) -> None:
    """Draw what each arm keeps of one image, at the budget nearest `tokens`, to a PNG.

    It is the first image that can be read; methods that read the question read its first one.
    """
    readable = runner.first_image()
    assert readable is not None  # or no arm would have run
    (name,) = readable.names
    item = next(item for item in runner.plan.items if name in item.images)
    image = runner.benchmark.load_image(name)
    pruned = [arm for arm in arms if arm.method != UNPRUNED and arm.unavailable is None]
    visual = runner.encode(readable, pruned)
    pictures = {f"{name}: all {visual.embeddings(0).shape[0]}": image}
    budgets = {arm.budget for arm in pruned if arm.budget is not None}
    for arm in pruned:
        if arm.budget != min(budgets, key=lambda budget: abs(budget - tokens)):
            continue
        chosen = runner.prune_images(visual, arm, [item.question])
        if chosen.sources is not None:  # merged tokens stand for all patches at once
            pictures[f"{arm.label} {arm.budget}: merges all"] = image
        else:
            pictures[f"{arm.label} {arm.budget}"] = overlay_tokens(image, chosen)
    contact_sheet(pictures, path)


def contact_sheet(pictures: Mapping[str, Image.Image], path: Path, columns: int = 4) -> None:
    """Lay out labelled pictures of one size in rows of `columns` and save them as a PNG."""
    width, height = next(iter(pictures.values())).size
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (width + GAP, height + LABEL_HEIGHT + GAP)
    sheet = Image.new("RGB", (GAP + columns * cell[0], GAP + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (label, picture) in enumerate(pictures.items()):
        left = GAP + position % columns * cell[0]
        top = GAP + position // columns * cell[1]
        draw.text((left, top + 4), label, fill="black", font_size=13)
        sheet.paste(picture.convert("RGB"), (left, top + LABEL_HEIGHT))
    sheet.save(path)
