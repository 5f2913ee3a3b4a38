"""Find and build the vision tower a config names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import SiglipVisionConfig

from llava.model.checkpoint import TOWER_PREFIX, read_json_object
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava.model.multimodal_encoder.vision_tower import VisionTower, read_vision_config
from llava.utils import UserInputError, user_path

# Another kind of tower is one entry here.
TOWER_CLASSES: tuple[type[VisionTower], ...] = (CLIPVisionTower, SiglipVisionTower)


def build_vision_tower(config: Any, delay_load: bool = False) -> VisionTower:
    """Build the tower that `config.mm_vision_tower` (or `vision_tower`) names.

    Its kind is what its config.json says, never what its name looks like.

    Args:
        config: a model config or training arguments. `name_or_path` is the checkpoint folder
            that a relative tower name refers to.
        delay_load: build without weights. A tower that cannot be found yet may still be found when
            it is loaded, as CLIP.

    Raises:
        UserInputError: without `delay_load`: a tower that is not found, or of an unknown kind.
    """
    name = getattr(config, "mm_vision_tower", None) or config.vision_tower
    source = resolve_vision_tower(name, getattr(config, "name_or_path", None))
    try:
        cls = _tower_class(read_vision_config(source, name), name)
    except UserInputError:
        if not delay_load:
            raise
        cls = CLIPVisionTower
    return cls(name, config, delay_load=delay_load, source=source)


def read_own_tower(config: Any, weights: Iterable[str], folder: Path) -> Any:
    """Read transformers' config of the tower whose weights a checkpoint has; None without any.

    Args:
        config: of the checkpoint.
        weights: their names in memory.
        folder: of the checkpoint.

    Raises:
        UserInputError: no file describes the tower, or one describes no tower that is known.
    """
    name = getattr(config, "mm_vision_tower", None)
    own = {k.removeprefix(TOWER_PREFIX) for k in weights if k.startswith(TOWER_PREFIX)}
    if not name or not own:
        return None
    raw = read_vision_config(resolve_vision_tower(name, str(folder)), name)
    tower_config = _tower_class(raw, name).parse_config(raw, name)
    if isinstance(tower_config, SiglipVisionConfig):
        # Checkpoints may lack the pooling head: no LLaVA runs it.
        tower_config.vision_use_head = any(name.startswith("head.") for name in own)
    return tower_config


def _tower_class(raw: dict[str, Any], name: str) -> type[VisionTower]:
    for cls in TOWER_CLASSES:
        if raw.get("model_type") in cls.kinds:
            return cls
    families = " or ".join(cls.family for cls in TOWER_CLASSES)
    raise UserInputError(
        f"the vision tower {name!r} is of type {raw.get('model_type')!r}; set mm_vision_tower to a "
        f"{families} model"
    )


def resolve_vision_tower(name: str, checkpoint: str | None) -> str:
    """Find out where a tower is read from.

    `~` is the home folder, and a slash at the end makes no difference. A relative name is looked
    up in the checkpoint folder, then in its parent. A checkpoint in
    Hugging Face's format describes its tower in its own config.json. Anything else is left to
    transformers, which knows paths and hub names.

    Returns:
        An existing folder, or `name`.
    """
    name = str(user_path(name))
    if checkpoint and not Path(name).is_absolute():
        folder = Path(checkpoint).absolute()
        for base in (folder, folder.parent):
            if (base / name / "config.json").is_file():
                return str(base / name)
        if _describes_tower(folder / "config.json"):
            return str(folder)
    return name


def _describes_tower(file: Path) -> bool:
    return file.is_file() and "vision_config" in read_json_object(file)


def is_portable(tower: VisionTower) -> bool:
    """Whether a saved model finds the tower by its name alone, wherever the model is moved.

    True for hub names and absolute paths, false for a folder that was found relative to the
    checkpoint or is the checkpoint itself.
    """
    return tower.source == str(user_path(tower.vision_tower_name))
