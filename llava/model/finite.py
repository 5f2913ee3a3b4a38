"""Say where NaN and inf come from, before they end in an empty answer."""

from collections.abc import Mapping
from typing import Any

import torch

from llava.utils import UserInputError


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or inf: one pass that makes no copy, and waits for the device."""
    values = values.detach()
    if values.is_meta or not values.is_floating_point():
        return True
    # A NaN or inf among the terms is one in the sum. The sum may also overflow by itself, which in
    # float16 it does soon.
    total = values.sum(dtype=torch.float32 if values.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(values.isfinite().all())


def check_weights(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that hold NaN or inf.

    Raises:
        UserInputError: names the first of them.
    """
    for name, value in weights.items():
        if not all_finite(value):
            raise UserInputError(
                f"{name!r} of {where} holds NaN or inf, so every answer about an image would be "
                "empty or noise; download the weights again, or use a checkpoint from before "
                "training broke down"
            )


def check_projected(
    model: Any, tiles: torch.Tensor, projected: torch.Tensor, image_index: torch.Tensor
) -> None:
    """Refuse tokens that hold NaN or inf, naming what they come from.

    One look at the tokens suffices: what is wrong with pixels or weights arrives there.

    Args:
        model: a ``LlavaMetaForCausalLM``.
        tiles: pixels [T, 3, H, W] or features [T, N, Dv] that ``projected`` was made of.
        projected: [T, N, D].
        image_index: int64 [T].

    Raises:
        UserInputError: names image or weight.
    """
    if all_finite(projected):
        return
    for tile, image in zip(tiles, image_index.tolist(), strict=True):
        if not all_finite(tile):
            kind = "pixels" if tiles.ndim == 4 else "features"
            raise UserInputError(
                f"the {kind} of image {image} hold NaN or inf values; check the {kind}, or make "
                "them again with process_images(pictures, image_processor, model.config)"
            )
    inner = model.get_model()
    for part, where in (("vision_tower", "the vision tower"), ("mm_projector", "the projector")):
        check_weights(dict(getattr(inner, part).named_parameters()), where)
    dtype = str(projected.dtype).removeprefix("torch.")
    raise UserInputError(
        f"the tokens of an image overflow in {dtype}, though pixels and weights are finite; load "
        "the model with dtype=torch.bfloat16 or torch.float32"
    )
