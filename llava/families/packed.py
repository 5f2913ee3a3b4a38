"""What methods read inside towers that take the patches of all images as one row (Qwen-VL).

They have no class token: what methods want of its attention is the attention that patches receive
from all patches of their image. A token joins several patches; its attention is their sum, its keys
are their mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.families.capture import Capture
from llava.families.towers import refuse_next_block
from llava.model.multimodal_encoder.readings import block_of
from llava.pruning.precision import outside_autocast
from llava.pruning.tokens import CLASS_ATTENTION, ENCODER_EXTRAS

# Readings of patches' attention, and of their keys.
_ATTENTION = (*CLASS_ATTENTION, "received_attention", "object_attention")
_KEYS = ("encoder_keys",)


class PackedReadings:
    """Reads the blocks of one call of a tower.

    Args:
        blocks: with `norm1` and `attn`, whose `qkv` makes queries, keys and values.
        sizes: patches of every image.
        needs: names of `VisualTokens.extras`; those that are not the tower's are left out.

    Raises:
        PruningError: what such a tower does not have.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], sizes: Sequence[int], needs: Collection[str]
    ) -> None:
        names = [name for name in ENCODER_EXTRAS if name in needs and name != "cls_feature"]
        refuse_next_block(names)
        self._names, self._sizes = names, list(sizes)
        self._blocks = [block_of(name, len(blocks), len(blocks)) for name in names]
        self._found: dict[str, list[Tensor]] = {}

    def capture(self) -> Capture:
        """Return the capture to run the tower under."""
        return Capture(self._read if self._names else None)

    @torch.no_grad()
    @outside_autocast()
    def _read(
        self, index: int, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        names = [n for n, at in zip(self._names, self._blocks, strict=True) if at == index]
        if not names:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        # What a patch attends to: its image, or a window of it.
        segments = kwargs["cu_seqlens"].diff().tolist()
        query, keys = _query_and_keys(block, hidden)
        rotated = [_rotated(t, kwargs["position_embeddings"]) for t in (query, keys)]
        for name in names:
            if name in _KEYS:
                self._found[name] = list(keys.mean(dim=1).split(self._sizes))
                continue
            parts = zip(*(states.split(segments) for states in rotated), strict=True)
            self._found[name] = [_received(q, k, block.attn.scaling) for q, k in parts]

    def extras(self, joined: int, order: Tensor | None) -> dict[str, list[Tensor]]:
        """Return what was read: per name a tensor [n, ...] for the n tokens of every image.

        Args:
            joined: patches of a token, one after the other.
            order: where the tower has each token of all images; None for raster order.
        """
        extras = {}
        for name, images in self._found.items():
            tokens = torch.cat(images).unflatten(0, (-1, joined))
            pooled = tokens.mean(dim=1) if name in _KEYS else tokens.sum(dim=1)
            if order is not None:
                pooled = pooled[order.to(pooled.device)]
            extras[name] = list(pooled.split([size // joined for size in self._sizes]))
        return extras


def _query_and_keys(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [n, heads, C] before rotation, at least float32."""
    states = block.attn.qkv(block.norm1(hidden.to(block.norm1.weight.dtype)))
    query, keys, _ = states.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
    wide = torch.promote_types(states.dtype, torch.float32)
    return query.to(wide), keys.to(wide)


def _rotated(states: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Turn states [n, heads, C] by their places (rotary position embedding)."""
    cos, sin = (part[:, None].to(states.dtype) for part in embeddings)
    one, other = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-other, one], dim=-1) * sin


def _received(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return [n]: the attention every patch of an image receives, summed over heads.

    Mean over all queries; one head at a time, because attention is n x n numbers.
    """
    heads = zip(query.unbind(1), keys.unbind(1), strict=True)
    return torch.stack([(q @ k.T * scale).softmax(dim=-1).mean(dim=0) for q, k in heads]).sum(0)
