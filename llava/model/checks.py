"""Refuse what a model cannot run with: configs, weights, prompts, images, questions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava.anyres import Size
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for
from llava.model.layouts import TileGeometry
from llava.model.types import VisualModel
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.finite import largest_of_last
from llava.pruning.late_checks import refuse_if
from llava.utils import UserInputError, describe_value
from llava.value_rules import list_of, unfit, whole

# LLaVA takes every other value for "square", so that a misspelt one changes all pixels silently.
ASPECTS = ("pad", "anyres", "square")
PADDING_SIDES = ("left", "right")
_PREPARE = "make them with process_images(pictures, image_processor, model.config)"
_PAIR = list_of(whole(1), length=2)
_GIVE_SIZES = "give image_sizes=[(width, height), ...], one pair of pixel counts for each image"


def check_config(model: VisualModel) -> None:
    """Refuse settings that would otherwise be read with the first image or prompt.

    Args:
        model: a LLaVA; the sizes of its vision tower, where it has one, decide with its config.

    Raises:
        UserInputError: names the setting in config.json and what it can be.
    """
    config = model.config
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and (type(limit) is not int or limit < 1):
        remedy = "give the longest prompt in tokens, such as 4096, or null for no limit"
        raise unfit("tokenizer_model_max_length", limit, "in config.json", remedy)
    words = {"image_aspect_ratio": ASPECTS, "tokenizer_padding_side": PADDING_SIDES}
    for name, known in words.items():
        value = getattr(config, name, None)
        if value is not None and value not in known:
            raise unfit(name, value, "in config.json", f"use one of {', '.join(known)}")
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


def check_ids(input_ids: Any) -> torch.Tensor:
    """Return ids if they are an int64 (or int32) tensor [B, L]; their values are not looked at.

    Raises:
        UserInputError: names what was given instead.
    """
    if input_ids is None:
        raise UserInputError("generate needs a prompt: pass ids of shape [B, L] as inputs")
    whole = isinstance(input_ids, torch.Tensor) and input_ids.dtype in (torch.int64, torch.int32)
    if not whole or input_ids.ndim != 2 or input_ids.numel() == 0:
        raise UserInputError(
            f"inputs must be token ids, an int64 tensor [B, L]; got {describe_value(input_ids)}; "
            "make them with tokenizer_image_token(prompt, tokenizer, return_tensors='pt')[None]"
        )
    return input_ids


def check_prompt(input_ids: Any, attention_mask: Any, vocabulary: int, **others: Any) -> None:
    """Check ids int64 [B, L] below `vocabulary` or image marks, and their mask [B, L] or None.

    Args:
        input_ids: what was given as ids.
        attention_mask: what was given as their mask; every row has to hold a token.
        vocabulary: number of tokens.
        others: other tensors of the shape of the ids, or None, by their names.

    Raises:
        UserInputError: names what was given instead.
    """
    check_ids(input_ids)
    strange = ((input_ids < 0) & (input_ids != IMAGE_TOKEN_INDEX)) | (input_ids >= vocabulary)
    if bool(strange.any()):
        raise UserInputError(
            f"token id {int(input_ids[strange][0])} is not in the vocabulary of {vocabulary} "
            "tokens; use the tokenizer that was loaded with this model"
        )
    for name, value in {"attention_mask": attention_mask, **others}.items():
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

    Raises:
        UserInputError: names what was given instead.
    """
    if images is None:
        return
    for part in images if isinstance(images, list | tuple) else [images]:
        fault, remedy = None, _PREPARE
        if not isinstance(part, torch.Tensor):
            fault = f"must be tensors; got {describe_value(part)}"
        elif not part.is_floating_point():
            fault = f"must be normalised pixels in floating point; got {describe_value(part)}"
        elif part.numel() == 0:
            fault = f"have no pixels: got shape {list(part.shape)}"
            remedy = "pass at least one tile for each image, and images=None where there is none"
        elif part.ndim >= 4 and part.shape[-3] != 3:
            fault = f"must have 3 colour channels [.., 3, H, W], got {list(part.shape)}"
        if fault is not None:
            raise UserInputError(f"images {fault}; {remedy}")


def check_sizes(image_sizes: Any, count: int) -> list[Size] | None:
    """Return the (width, height) of `count` images as whole numbers; None where none were given.

    Raises:
        UserInputError: names what was given instead.
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
        try:
            width, height = _PAIR.read([_plain(length) for length in size])
        except (TypeError, ValueError) as error:
            raise UserInputError(
                f"image_sizes[{number}] is {size!r}, not the (width, height) of an image; "
                f"{_GIVE_SIZES}"
            ) from error
        checked.append((width, height))
    return checked


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_questions(questions: Any, count: int, kind: str) -> None:
    """Raise UserInputError unless there is a text that is not blank for each of `count`."""
    if isinstance(questions, str) or not isinstance(questions, Sequence):
        raise UserInputError(f"questions must be a list of texts, got {questions!r}")
    if len(questions) != count:
        raise UserInputError(f"questions: {len(questions)} texts were given for {count} {kind}")
    for text in questions:
        if not isinstance(text, str) or not text.strip():
            raise UserInputError(f"a question must be a text that is not blank, got {text!r}")


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or inf: one pass without a copy, which waits for the device."""
    values = values.detach()
    if values.is_meta or not values.is_floating_point():
        return True
    # A NaN or inf among the terms is one in the sum. The sum may also overflow by itself, which in
    # float16 it does soon.
    total = values.sum(dtype=torch.float32 if values.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(values.isfinite().all())


def check_weights(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights with NaN or inf.

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
    model: VisualModel, tiles: torch.Tensor, projected: torch.Tensor, image_index: torch.Tensor
) -> None:
    """Refuse tokens with NaN or inf, naming what they come from; see `refuse_if` for when.

    One look at the tokens suffices: what is wrong with pixels or weights arrives there.

    Args:
        model: the LLaVA that made them.
        tiles: pixels [T, 3, H, W] or features [T, N, Dv] that `projected` was made of.
        projected: [T, N, D].
        image_index: int64 [T].

    Raises:
        UserInputError: names image or weight.
    """
    if projected.is_meta:
        return
    largest, dtype = largest_of_last(projected.detach()), projected.dtype
    refuse_if(
        largest.device,
        lambda: ~largest.isfinite(),
        lambda: _not_finite(model, tiles, dtype, image_index),
    )


def _not_finite(
    model: VisualModel, tiles: torch.Tensor, dtype: torch.dtype, image_index: torch.Tensor
) -> UserInputError:
    """Return the error for tokens with NaN or inf; names image or weight."""
    for tile, image in zip(tiles, image_index.tolist(), strict=True):
        if not all_finite(tile):
            kind = "pixels" if tiles.ndim == 4 else "features"
            return UserInputError(
                f"the {kind} of image {image} hold NaN or inf values; check the {kind}, or make "
                "them again with process_images(pictures, image_processor, model.config)"
            )
    inner = model.get_model()
    for part, where in (("vision_tower", "the vision tower"), ("mm_projector", "the projector")):
        try:
            check_weights(dict(getattr(inner, part).named_parameters()), where)
        except UserInputError as error:
            return error
    name = str(dtype).removeprefix("torch.")
    return UserInputError(
        f"the tokens of an image overflow in {name}, though pixels and weights are finite; load "
        "the model with dtype=torch.bfloat16 or torch.float32"
    )
