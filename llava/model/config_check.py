"""What a model's config says, checked when it is loaded instead of at the first question."""

from typing import Any

from llava.conversation import conv_mode_for
from llava.model.layouts import TileGeometry
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.utils import UserInputError

# LLaVA takes every other value for "square", so that a misspelt one changes all pixels silently.
ASPECTS = ("pad", "anyres", "square")
PADDING_SIDES = ("left", "right")


def check_config(model: Any) -> None:
    """Refuse settings that are read with images and prompts only.

    Args:
        model: a LLaVA; the sizes of its vision tower, where it has one, decide with its config.

    Raises:
        UserInputError: names the setting in config.json and what it can be.
    """
    config = model.config
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserInputError(
            f"tokenizer_model_max_length in config.json is {limit!r}; give the longest prompt in "
            "tokens, such as 4096, or null for no limit"
        )
    for name, values in (
        ("image_aspect_ratio", ASPECTS),
        ("tokenizer_padding_side", PADDING_SIDES),
    ):
        value = getattr(config, name, None)
        if value is not None and value not in values:
            raise UserInputError(
                f"{name} in config.json is {value!r}; use one of {', '.join(values)}"
            )
    conv_mode_for("", config)
    settings = getattr(config, "mm_token_pruning", None)
    try:
        if settings is not None:
            PruningConfig.from_dict(settings)
    except PruningError as error:
        raise UserInputError(
            f"mm_token_pruning in config.json cannot be used: {error}; correct or remove it, or "
            "load the model with pruning="
        ) from error
    tower = model.get_vision_tower()
    if tower is not None:
        tower.check_selection()
        side = tower.num_patches_per_side
        TileGeometry.of(config, (side, side), tower.config.image_size)
        _check_squares(config, tower.image_processor)


def _check_squares(config: Any, processor: Any) -> None:
    """Refuse pictures that reach the tower in their own shape: nothing pads, cuts or squeezes."""
    aspect = getattr(config, "image_aspect_ratio", None)
    shaped = processor.do_resize and "shortest_edge" in dict(processor.size)
    if aspect in (None, "square") and shaped and not processor.do_center_crop:
        raise UserInputError(
            "do_center_crop in preprocessor_config.json is false, so pictures that are not square "
            "do not fit the vision tower; set it to true, give size as a height and a width, or "
            "set image_aspect_ratio in config.json to 'pad'"
        )
