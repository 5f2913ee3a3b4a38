"""Refuse what `generate` cannot read, before anything is computed from it."""

from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.utils import UserInputError, describe_value


def check_prompt(input_ids: Any, attention_mask: Any, vocabulary: int) -> None:
    """Check ids int64 [B, L] below `vocabulary` or image marks, and their mask [B, L] or None.

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
    strange = ((input_ids < 0) & (input_ids != IMAGE_TOKEN_INDEX)) | (input_ids >= vocabulary)
    if bool(strange.any()):
        raise UserInputError(
            f"token id {int(input_ids[strange][0])} is not in the vocabulary of {vocabulary} "
            "tokens; use the tokenizer that was loaded with this model"
        )
    if attention_mask is not None and (
        not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape
    ):
        raise UserInputError(
            f"attention_mask must be a tensor {list(input_ids.shape)} like the ids; got "
            f"{describe_value(attention_mask)}"
        )


def check_images(images: Any) -> None:
    """Check that images are a tensor or a list of tensors, pixels with three channels.

    Raises UserInputError naming what was given instead.
    """
    if images is None:
        return
    parts = list(images) if isinstance(images, list | tuple) else [images]
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise UserInputError(
                f"images must be tensors; got {describe_value(part)}; make them with "
                "process_images(pictures, image_processor, model.config)"
            )
        if part.ndim >= 4 and part.shape[-3] != 3:
            raise UserInputError(
                f"images must have 3 colour channels [.., 3, H, W], got {list(part.shape)}; make "
                "them with process_images(pictures, image_processor, model.config)"
            )
