"""InternVL: square tiles, 2 x 2 patches joined to a token (pixel shuffle), a normed projector.

The crops of an image come first, its thumbnail last. Only the prompt says how many tiles an image
has: its placeholders stand in one run. Frames of videos come as images of one tile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.families.family import Family, register
from llava.families.prompts import find_runs, mismatch
from llava.families.towers import EncoderReadings, digests, pool_readings, square_tiles
from llava.model.multimodal_encoder.readings import CLASS_FEATURE
from llava.pruning.tokens import VisualTokens


@register
class InternVL(Family):
    """`OpenGVLab/InternVL3-*-hf` and others in transformers' own format."""

    name: ClassVar[str] = "internvl"
    classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    processing: ClassVar[Mapping[str, Any]] = {"crop_to_patches": True}

    def projector(self, model: Any) -> nn.Module:
        module: nn.Module = model.model.multi_modal_projector
        return module

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = model.model.vision_tower.encoder.layer
        return layers

    def tile_counts(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        """Count the tiles of every image.

        Raises:
            PruningError: the placeholders are not those of the tiles.
        """
        each, total = len(_groups(model)), len(inputs["pixel_values"])
        marks = ids == model.config.image_token_id
        runs = [length for row in marks for _, length in find_runs(row)]
        if sum(runs) != each * total or any(run % each for run in runs):
            raise mismatch(sum(runs), len(runs), each * total)
        return [run // each for run in runs]

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        each = len(_groups(model))
        return [count * each for count in self.tile_counts(model, inputs, ids)]

    def count(self, model: Any, inputs: Mapping[str, Any]) -> int:
        return len(inputs["pixel_values"]) * len(_groups(model))

    def frame(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        ids: list[int] = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return ids[:1], ids[1:]

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens:
        counts, groups = self.tile_counts(model, inputs, ids), _groups(model)
        layers, layer = [_Block(block) for block in self.blocks(model)], _layer(model)
        # Nothing runs after the last block that would have the class token as its input.
        last = layer == len(layers) and CLASS_FEATURE in needs
        wanted = set(needs) - {CLASS_FEATURE} if last else needs
        readings = EncoderReadings(layers, layer, 1, wanted)
        output, features, projected = self.run_vision(model, inputs, readings.capture())
        found = readings.extras(len(projected))
        if last:
            found[CLASS_FEATURE] = list(output.last_hidden_state[:, 0])
        return square_tiles(
            counts,
            round(len(groups) ** 0.5),
            features,
            projected,
            projector=self.projector(model),
            extras={**pool_readings(found, groups), **digests(inputs["pixel_values"], needs)},
        )


class _Attention:
    """The attention of a block, with names and norms as `llava.model`'s readings take them."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim

    def q_proj(self, x: Tensor) -> Tensor:
        query: Tensor = self._attention.q_norm(self._attention.q_proj(x))
        return query

    def k_proj(self, x: Tensor) -> Tensor:
        keys: Tensor = self._attention.k_norm(self._attention.k_proj(x))
        return keys


class _Block:
    def __init__(self, block: Any) -> None:
        self.layer_norm1 = block.layernorm_before
        self.self_attn = _Attention(block.attention)


def _layer(model: Any) -> int:
    """Return how many blocks of the tower make the features."""
    layer, total = model.config.vision_feature_layer, len(model.model.vision_tower.encoder.layer)
    return layer if layer >= 0 else total + 1 + layer


def _groups(model: Any) -> Tensor:
    """Return the patches that every token of a tile joins: LongTensor [N, 4]."""
    config = model.config
    (height, _), (edge, _) = config.vision_config.image_size, config.vision_config.patch_size
    numbers = torch.arange((height // edge) ** 2).view(1, height // edge, height // edge, 1)
    shuffled: Tensor = model.model.pixel_shuffle(numbers, scale_factor=config.downsample_ratio)
    return shuffled.flatten(0, 2)
