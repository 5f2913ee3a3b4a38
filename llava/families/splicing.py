"""Put what is left of images into prompts: the last step before the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llava.families.deep import DeepFeatures
from llava.families.prompts import PrunedPrompts

if TYPE_CHECKING:
    from llava.families.family import Family


class Spliced(NamedTuple):
    """Pruned prompts of a batch.

    Attributes:
        ids: LongTensor [B, L'], placeholders for the tokens of images.
        embeds: [B, L', D].
        mask: BoolTensor [B, L'], False for padding.
        position_ids: as the model takes them.
        deep: features for inner layers.
    """

    ids: Tensor
    embeds: Tensor
    mask: Tensor
    position_ids: Tensor
    deep: DeepFeatures | None


def splice(family: Family, model: Any, ids: Tensor, pruned: PrunedPrompts, kept: Any) -> Spliced:
    """Embed pruned prompts with their images.

    Args:
        family: of the model.
        model: the model.
        ids: LongTensor [B, L] of the unpruned prompts, on the model's device.
        pruned: which of their columns are left.
        kept: what is left of their images; None for prompts without any.
    """
    own = pruned.take(ids, _padding_id(model))
    embeds = family.embed(model, own)
    deep = None
    if kept is not None:
        visual = pruned.visual.to(embeds.device)
        images = [kept.embeddings(number) for number in range(kept.num_images)]
        tokens = torch.cat([image.to(embeds.device, embeds.dtype) for image in images])
        embeds = embeds.masked_scatter(visual[..., None], tokens)
        if getattr(kept, "deep", ()):
            levels = [torch.cat([*level]).to(embeds.device) for level in kept.deep]
            deep = DeepFeatures(visual, levels)
    position_ids = family.position_ids(pruned.positions, pruned.mask).to(ids.device)
    return Spliced(own, embeds, pruned.mask.to(ids.device), position_ids, deep)


def _padding_id(model: Any) -> int:
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0
