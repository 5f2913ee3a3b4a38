"""What the active pruning method asks for, collected while images and prompts pass by.

Methods name it in ``needs`` and ``wants``; nothing else is computed, and the mixin's methods know
none of the names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from llava.model.multimodal_encoder.readings import CLASS_FEATURE, TowerReader
from llava.model.prompt_inputs import asked, needed_of_question, read_questions
from llava.model.splice import count_marks, image_positions, share_images
from llava.model.tiles import tile_digest
from llava.pruning.config import PruningConfig
from llava.pruning.tokens import ENCODER_EXTRAS, Prompt, VisualTokens
from llava.utils import UserInputError


class EncodedTiles(NamedTuple):
    """Tiles on both sides of the projector: features [T, N, Dv], projected [T, N, D].

    ``extras`` holds what was asked for beyond them, one entry a tile.
    """

    features: torch.Tensor
    projected: torch.Tensor
    extras: dict[str, Any]


def encode_tiles(model: Any, tiles: torch.Tensor, needs: Iterable[str] | None) -> EncodedTiles:
    """Run tower and projector once over tiles and read what is needed on the way.

    Args:
        model: a ``LlavaMetaForCausalLM``.
        tiles: pixels [T, 3, H, W], or features of the tower [T, N, Dv] computed before.
        needs: names of extras; None for those of the active method.

    Raises:
        UserInputError: features of another width, or computed before where more of the tower is
            needed.
    """
    needs = _needed_of_images(model.pruning) if needs is None else set(needs)
    projector = model.get_model().mm_projector
    names = [name for name in ENCODER_EXTRAS if name in needs]
    if not model.get_vision_tower().has_class_token and CLASS_FEATURE in names:
        names.remove(CLASS_FEATURE)  # methods are told by VisualTokens.class_token
    reader = TowerReader(names)
    if tiles.ndim == 4:
        # encode_images is what others patch, so it is called as it is, and the tower hands its
        # features to the reader.
        with reader.reading():
            projected = model.encode_images(tiles)
        features = for_projector(projector, _features(reader, projected))
    else:
        width = model.config.mm_hidden_size
        if tiles.shape[-1] != width:
            raise UserInputError(
                f"3-dimensional images are tower features [B, N, {width}] but have shape "
                f"{tuple(tiles.shape)}; pixels need 4 dimensions [B, 3, H, W]"
            )
        features = for_projector(projector, tiles)
        projected = projector(features)
    extras: dict[str, Any] = reader.extras(len(tiles))
    if "image_digest" in needs:
        extras["image_digest"] = [tile_digest(tile) for tile in tiles]
    return EncodedTiles(features, projected, extras)


def for_projector(projector: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Features on the projector's device and in its precision: callers may hold others."""
    weight = next(projector.parameters(), None)
    return features if weight is None else features.to(weight.device, weight.dtype)


def add_questions(model: Any, visual: VisualTokens, questions: Sequence[str]) -> VisualTokens:
    """``visual`` with what the active method reads of ``questions``, one for each image."""
    extras = read_questions(model, visual, questions)
    return replace(visual, extras=visual.extras | extras) if extras else visual


def add_prompts(model: Any, visual: VisualTokens, rows: list[torch.Tensor]) -> VisualTokens:
    """``visual`` with what the prompts say of their images: room, place and, if read, question.

    Args:
        model: a ``LlavaMetaForCausalLM``.
        visual: encoded images in the order of the marks.
        rows: ids of every prompt, padding removed.

    Raises:
        UserInputError: another number of images than marks, or questions that are missing.
    """
    shares = share_images(count_marks(rows), visual.num_images)
    visual = replace(visual, prompts=_prompts(model.config, rows, shares))
    if visual.extras:
        places = image_positions(rows, visual.num_images)
        visual = replace(visual, extras={**visual.extras, "image_position": places})
    if needed_of_question(model.pruning, model.get_vision_tower()):
        questions = asked(len(rows), model.pruning.method)
        of_images = [questions[row] for row, share in enumerate(shares) for _ in share]
        visual = model.with_questions(visual, of_images)
    return visual


def _prompts(config: Any, rows: list[torch.Tensor], shares: Sequence[range]) -> tuple[Prompt, ...]:
    """What every prompt with images holds, where its length is limited."""
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is None:
        return ()
    return tuple(
        Prompt(tuple(share), len(row) - count, limit)
        for row, share, count in zip(rows, shares, count_marks(rows), strict=True)
        if count
    )


def _needed_of_images(config: PruningConfig | None) -> set[str]:
    return set() if config is None else set(config.pruner.needs)


def _features(reader: TowerReader, projected: torch.Tensor) -> torch.Tensor:
    """[T, N, Dv]: what the tower made of the tiles that were projected to [T, N, D]."""
    features = torch.cat(reader.features) if reader.features else projected[:0]
    if features.shape[:2] != projected.shape[:2]:
        raise UserInputError(
            f"encode_images made {list(projected.shape[:2])} tokens of {list(features.shape[:2])} "
            "features of the vision tower; an encode_images of your own must run the model's tower "
            "once over its images and project every feature to one token"
        )
    return features
