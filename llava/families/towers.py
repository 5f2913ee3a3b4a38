"""What methods read inside vision towers that are made like CLIP's and SigLIP's encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.families.capture import Capture
from llava.model.multimodal_encoder.readings import CLASS_FEATURE, TowerReader
from llava.model.vision_inputs import tile_digest
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.tokens import ENCODER_EXTRAS, VisualTokens


class ClipTower:
    """The vision tower of a model as `clip_text` takes it: says where its text tower comes from.

    Args:
        vision_tower: a CLIP tower.
        source: folder or hub name of the complete CLIP model that it was taken from.
    """

    def __init__(self, vision_tower: Any, source: str) -> None:
        self.vision_tower, self.source, self.vision_tower_name = vision_tower, source, source

    @property
    def device(self) -> torch.device:
        """Where the tower computes; weights that are offloaded lie elsewhere between calls."""
        norm = self.vision_tower.post_layernorm
        hook = getattr(norm, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return norm.weight.device if device is None else torch.device(device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its weights."""
        dtype: torch.dtype = self.vision_tower.post_layernorm.weight.dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Width of its features."""
        size: int = self.vision_tower.config.hidden_size
        return size


class EncoderReadings:
    """Reads the blocks of one call of a tower with `layer_norm1` and `self_attn` in its blocks.

    Args:
        layers: the blocks, see `readable`.
        used: how many of them make the features.
        first: where patches begin: 1 behind a class token, else 0.
        needs: names of `VisualTokens.extras`; those that are not the tower's are left out.

    Raises:
        PruningError: what such a tower does not have.
    """

    def __init__(self, layers: Any, used: int, first: int, needs: Collection[str]) -> None:
        names = [name for name in ENCODER_EXTRAS if name in needs]
        if used == len(layers):
            refuse_next_block(names)
        # Without a class token methods are told by VisualTokens.class_token.
        self.reader = TowerReader(n for n in names if first or n != CLASS_FEATURE)
        self._layers, self._used, self._first = layers, used, first

    def capture(self) -> Capture:
        """Return the capture to run the tower under."""
        return Capture(self._read if self.reader.found else None)

    @torch.no_grad()
    def _read(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index <= self._used:
            self.reader.read_block(index, self._used, self._layers, hidden, self._first)
        if index == self._used:
            self.reader.read_output(hidden)

    def extras(self, tiles: int) -> dict[str, list[Tensor]]:
        """Return what was read, one tensor a tile for each name; see `TowerReader.extras`."""
        return self.reader.extras(tiles)


def encoder_blocks(tower: Any) -> Sequence[nn.Module]:
    """Return the blocks of a tower of CLIP's, SigLIP's or DINOv2's kind."""
    encoder = tower.encoder
    blocks: Sequence[nn.Module] = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    return blocks


def readable(blocks: Sequence[nn.Module]) -> Sequence[Any]:
    """Return blocks with the names that readings know: `layer_norm1` and `self_attn`."""
    return [block if hasattr(block, "layer_norm1") else _Dinov2Block(block) for block in blocks]


class _Dinov2Block:
    """A block of DINOv2 by CLIP's names; shares its modules."""

    def __init__(self, block: Any) -> None:
        self.layer_norm1 = block.norm1
        self.self_attn = _Dinov2Attention(block.attention)


class _Dinov2Attention:
    """The attention of a block of DINOv2; older transformers have its products one level deeper."""

    def __init__(self, attention: Any) -> None:
        inner = getattr(attention, "attention", None)
        if inner is None:
            self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
            self.head_dim = attention.head_dim
        else:
            self.q_proj, self.k_proj = inner.query, inner.key
            self.head_dim = inner.attention_head_size
        self.num_heads = self.q_proj.out_features // self.head_dim


def refuse_next_block(names: Collection[str]) -> None:
    """Refuse readings of the block after the features, where the tower ends with these.

    Raises:
        PruningError: names the first such reading.
    """
    missing = [name for name in names if name.startswith("next_")]
    if missing:
        raise PruningError(
            f"the pruning method reads {missing[0]!r}, the block after the features, but the "
            "features of this model come from the last block of its tower; use another method"
        )


def pool_readings(found: Mapping[str, Sequence[Tensor]], groups: Tensor) -> dict[str, list[Tensor]]:
    """Bring readings of patches to the tokens that join them.

    The attention of a token is the sum over its patches, its keys are their mean. The class token's
    feature is repeated: it is what the class tokens of all patches of a token would be.

    Args:
        found: per name a tensor [P, ...] for every tile; of `cls_feature` [C].
        groups: LongTensor [N, G], the patches of every token.
    """
    pooled = {}
    for name, tiles in found.items():
        if name == CLASS_FEATURE:
            pooled[name] = [tile.repeat(groups.shape[1]) for tile in tiles]
            continue
        own = [tile[groups.to(tile.device)] for tile in tiles]
        pooled[name] = [x.mean(dim=1) if name.endswith("keys") else x.sum(dim=1) for x in own]
    return pooled


def square_tiles(
    counts: Sequence[int], side: int, features: Tensor, projected: Tensor, **more: Any
) -> VisualTokens:
    """Put images together whose processors scale every tile to a full square, without padding.

    Args:
        counts: tiles of every image, which are read one after the other.
        side: rows and columns of the tokens of a tile.
        features, projected: [T, N, C] and [T, N, D] of all tiles.
        more: other fields of `VisualTokens`.
    """
    # How the crops of an image lie, only the size of the image would tell.
    layouts = tuple(
        ImageLayout((side, side), crops=(1, count - 1) if count > 1 else (0, 0), joined=False)
        for count in counts
    )
    return VisualTokens(
        features=features,
        projected=projected,
        image_index=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        grid=(side, side),
        layouts=layouts,
        blank=no_padding(projected),
        **more,
    )


def no_padding(tokens: Tensor) -> Tensor:
    """Return `VisualTokens.blank` of tokens [T, N, D] that all show something of their image."""
    return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def digests(tiles: Tensor, needs: Collection[str]) -> dict[str, Any]:
    """Return the extra `image_digest` of tiles [T, ...] where it is needed."""
    if "image_digest" not in needs:
        return {}
    return {"image_digest": [tile_digest(tile) for tile in tiles]}
