"""What is asked of a language model's layers, and the attention of a few queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# cos and sin [B, S, d] of rotary embeddings; B may be 1 where all rows have the same positions.
Rotary = tuple[Tensor, Tensor]


class DecoderLayers(Protocol):
    """The layers of a language model, as `llava.pruning.decoder` sees them.

    Attributes:
        module: what runs them one after the other: called with `attention_mask` [B, L],
            `position_ids` and `past_key_values`, it returns `last_hidden_state` [B, L, D].
        layers: called with hidden states [B, S, D], and by keyword `attention_mask`,
            `position_embeddings`, `position_ids` and `past_key_values`.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def layers(self) -> Sequence[nn.Module]: ...

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Return the rotary embeddings of LongTensor positions [B, S], in the type of `hidden`."""

    def queries(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Return the queries [B, H, S, d] of a layer for its inputs [B, S, D]."""

    def keys(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Return the keys [B, H, S, d] of a layer, those of a group once for each of its heads."""

    def scaling(self, layer: int) -> float:
        """Return what products of queries and keys are multiplied with."""

    def attention_mask(self, hidden: Tensor, mask: Tensor | None, seen: int) -> Any:
        """Return the causal mask of a layer in the form that its attention takes.

        Args:
            hidden: [B, S, D], inputs of the layer.
            mask: BoolTensor [B, seen + S], False for padding; None where there is none.
            seen: columns that the layer's cache holds.
        """

    def check(self, cache: Any) -> None:
        """Refuse models and caches whose layers cannot differ in length.

        Raises:
            PruningError: names what to use instead.
        """


def take_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return columns [B, Q] of values [B or 1, S, ...]: [B, Q, ...]."""
    values = values.expand(len(columns), *values.shape[1:])
    index = columns.view(*columns.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*columns.shape, *values.shape[2:]))


def attention_rows(
    decoder: DecoderLayers,
    layer: int,
    hidden: Tensor,
    rotary: Rotary,
    valid: Tensor,
    queries: Tensor,
) -> Tensor:
    """Return the attention of a few tokens, as the layer computes it, whatever kernel it uses.

    Args:
        decoder: the layers.
        layer: which of them.
        hidden: [B, S, D], its inputs.
        rotary: of all columns.
        valid: BoolTensor [B, S], False for padding.
        queries: LongTensor [B, Q], columns that attend.

    Returns:
        At least float32 [B, H, Q, S], rows that add up to 1: a column attends to itself and those
        before.
    """
    cos, sin = (take_columns(part, queries) for part in rotary)
    kind = torch.promote_types(hidden.dtype, torch.float32)
    own = decoder.queries(layer, take_columns(hidden, queries), (cos, sin)).to(kind)
    keys = decoder.keys(layer, hidden, rotary).to(kind)
    logits = (own @ keys.transpose(2, 3) * decoder.scaling(layer)).to(hidden.device)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    seen = (columns <= queries[..., None]) & valid[:, None]
    return logits.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
