"""Find and build the vision tower a config names."""

import json
from pathlib import Path
from typing import Any

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def build_vision_tower(config: Any, delay_load: bool = False) -> CLIPVisionTower:
    """Build the tower that ``config.mm_vision_tower`` (or ``vision_tower``) names.

    Args:
        config: a model config or training arguments. ``name_or_path`` is the checkpoint folder
            that a relative tower name refers to.
        delay_load: build without weights.
    """
    name = getattr(config, "mm_vision_tower", None) or config.vision_tower
    source = resolve_vision_tower(name, getattr(config, "name_or_path", None))
    return CLIPVisionTower(name, config, delay_load=delay_load, source=source)


def resolve_vision_tower(name: str, checkpoint: str | None) -> str:
    """Where a tower is read from.

    A relative name is looked up in the checkpoint folder, then in its parent. A checkpoint in
    Hugging Face's format describes its tower in its own config.json. Anything else is left to
    transformers, which knows paths and hub names.

    Returns:
        An existing folder, or ``name``.
    """
    if checkpoint and not Path(name).is_absolute():
        folder = Path(checkpoint).absolute()
        for base in (folder, folder.parent):
            if (base / name / "config.json").is_file():
                return str(base / name)
        if _describes_tower(folder / "config.json"):
            return str(folder)
    return name


def _describes_tower(file: Path) -> bool:
    return file.is_file() and "vision_config" in json.loads(file.read_text(encoding="utf-8"))


def is_portable(tower: CLIPVisionTower) -> bool:
    """Whether a saved model finds the tower by its name alone, wherever the model is moved.

    True for hub names and absolute paths, false for a folder that was found relative to the
    checkpoint or is the checkpoint itself.
    """
    return tower.source == tower.vision_tower_name
