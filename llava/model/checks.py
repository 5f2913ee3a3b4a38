"""Refuse what a model cannot read, before anything is computed from it."""

from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import Size
from llava.utils import UserInputError, describe_value

_PREPARE = "make them with process_images(pictures, image_processor, model.config)"
_GIVE_SIZES = "give image_sizes=[(width, height), ...], one pair of pixel counts for each image"


def check_ids(input_ids: Any) -> None:
    """Check that ids are an int64 (or int32) tensor [B, L]; their values are not looked at.

    Raises UserInputError naming what was given instead.
    """
    if input_ids is None:
        raise UserInputError("generate needs a prompt: pass ids of shape [B, L] as inputs")
    whole = isinstance(input_ids, torch.Tensor) and input_ids.dtype in (torch.int64, torch.int32)
    if not whole or input_ids.ndim != 2 or input_ids.numel() == 0:
        raise UserInputError(
            f"inputs must be token ids, an int64 tensor [B, L]; got {describe_value(input_ids)}; "
            "make them with tokenizer_image_token(prompt, tokenizer, return_tensors='pt')[None]"
        )


def check_prompt(input_ids: Any, attention_mask: Any, vocabulary: int, **beside: Any) -> None:
    """Check ids int64 [B, L] below `vocabulary` or image marks, and their mask [B, L] or None.

    Args:
        input_ids: what was given as ids.
        attention_mask: what was given as their mask; every row has to hold a token.
        vocabulary: number of tokens.
        beside: other tensors of the shape of the ids, or None, by their names.

    Raises UserInputError naming what was given instead.
    """
    check_ids(input_ids)
    strange = ((input_ids < 0) & (input_ids != IMAGE_TOKEN_INDEX)) | (input_ids >= vocabulary)
    if bool(strange.any()):
        raise UserInputError(
            f"token id {int(input_ids[strange][0])} is not in the vocabulary of {vocabulary} "
            "tokens; use the tokenizer that was loaded with this model"
        )
    for name, value in {"attention_mask": attention_mask, **beside}.items():
        if value is not None and (
            not isinstance(value, torch.Tensor) or value.shape != input_ids.shape
        ):
            raise UserInputError(
                f"{name} must be a tensor {list(input_ids.shape)} like the ids; got "
                f"{describe_value(value)}"
            )
    if attention_mask is not None:
        empty = ~attention_mask.bool().any(dim=1)
        if bool(empty.any()):
            raise UserInputError(
                f"row {int(empty.nonzero()[0])} of attention_mask is 0 throughout, so that row has "
                "no prompt; set the mask to 1 where a row has tokens, or leave the row out"
            )


def check_images(images: Any) -> None:
    """Check that images are floating-point tensors or a list of them, with three channels.

    Raises UserInputError naming what was given instead.
    """
    if images is None:
        return
    parts = list(images) if isinstance(images, list | tuple) else [images]
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise UserInputError(f"images must be tensors; got {describe_value(part)}; {_PREPARE}")
        if not part.is_floating_point():
            raise UserInputError(
                f"images must be normalised pixels in floating point; got {describe_value(part)}; "
                f"{_PREPARE}"
            )
        if part.numel() == 0:
            raise UserInputError(
                f"images hold no pixel: got shape {list(part.shape)}; pass at least one tile for "
                "each image, and images=None where there is none"
            )
        if part.ndim >= 4 and part.shape[-3] != 3:
            raise UserInputError(
                f"images must have 3 colour channels [.., 3, H, W], got {list(part.shape)}; "
                f"{_PREPARE}"
            )


def check_sizes(image_sizes: Any, count: int) -> list[Size] | None:
    """The (width, height) of `count` images as whole numbers; None where none were given.

    Raises UserInputError naming what was given instead.
    """
    if image_sizes is None:
        return None
    sizes = _plain(image_sizes)
    if not isinstance(sizes, list | tuple):
        raise UserInputError(f"image_sizes must be a list of pairs, got {sizes!r}; {_GIVE_SIZES}")
    if len(sizes) != count:
        raise UserInputError(
            f"image_sizes has {len(sizes)} entries for {count} images; {_GIVE_SIZES}"
        )
    checked = []
    for number, size in enumerate(map(_plain, sizes)):
        pair = isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_length, size))
        if not pair:
            raise UserInputError(
                f"image_sizes[{number}] is {size!r}, not the (width, height) of an image; "
                f"{_GIVE_SIZES}"
            )
        checked.append((int(size[0]), int(size[1])))
    return checked


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_length(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and int(value) == value and value >= 1
    except (TypeError, ValueError, OverflowError):  # no number, NaN, inf
        return False
