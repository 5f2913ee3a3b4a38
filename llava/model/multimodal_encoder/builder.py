"""Find and build the vision tower a config names."""

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

    A relative name is looked up in the checkpoint folder, then in its parent; anything else is
    left to transformers, which knows paths and hub names.

    Returns:
        An existing folder, or ``name``.
    """
    if checkpoint and not Path(name).is_absolute():
        folder = Path(checkpoint).absolute()
        for base in (folder, folder.parent):
            if (base / name / "config.json").is_file():
                return str(base / name)
    return name


def is_portable(tower: CLIPVisionTower) -> bool:
    """Whether a saved model finds the tower by its name alone, wherever the model is moved.

    True for hub names and absolute paths, false for a folder that was found relative to the
    checkpoint.
    """
    return tower.source == tower.vision_tower_name
