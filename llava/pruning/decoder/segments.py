"""What later steps must know of the layers between two cuts: it is kept with the cache.

Rows of the cache may change places among the answers to one prompt, as beams do, and not among
prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.errors import PruningError

# Attribute of a cache: it goes along when the cache is copied.
_MARK = "_decoder_segments"


@dataclass(eq=False)
class Segment:
    """Prompts as the layers between two cuts read them.

    Attributes:
        first: index of the first of these layers.
        columns: LongTensor [B, S], the column of every token in the prompts of layer 0, ascending;
            that of the image's last token for tokens that were made; -1 for padding.
        positions: LongTensor [B, S].
        shift: LongTensor [B], by how much the positions of what follows are smaller than in layer
            0; None where they are the same.
        padded: whether a row is shorter than S.
    """

    first: int
    columns: Tensor
    positions: Tensor
    shift: Tensor | None
    padded: bool

    @property
    def valid(self) -> Tensor:
        """BoolTensor [B, S], False for padding."""
        return self.columns >= 0

    @property
    def width(self) -> int:
        """S."""
        return self.columns.shape[1]

    def restored(self, hidden: Tensor, width: int) -> Tensor:
        """Return hidden states [B, S, D] with one column for each of layer 0: [B, width, D].

        What was dropped has the state of the last token before it that was not.
        """
        wanted = torch.arange(width, device=hidden.device).expand(len(hidden), -1).contiguous()
        own = self.columns.to(hidden.device).contiguous()
        at = torch.searchsorted(own, wanted, right=True) - 1
        at = at.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
        return hidden.gather(1, at)


def remember(cache: Any, segments: list[Segment]) -> None:
    """Mark a cache with the segments of the prompts that it begins with."""
    if hasattr(cache, "get_seq_length"):
        setattr(cache, _MARK, segments)


def segments_of(cache: Any) -> list[Segment] | None:
    """Return the segments of the prompts that a cache begins with; None for any other cache.

    Raises:
        PruningError: the cache was cut inside the prompts.
    """
    segments: list[Segment] | None = getattr(cache, _MARK, None)
    if segments is None:
        return None
    lengths = [int(cache.get_seq_length(segment.first)) for segment in segments]
    if not any(lengths):  # emptied for another prompt
        delattr(cache, _MARK)
        return None
    after = {length - own.width for length, own in zip(lengths, segments, strict=True)}
    if min(after) < 0 or len(after) > 1:
        raise PruningError(
            f"the cache was cut to {lengths[0]} tokens: not every layer holds its share of the "
            f"prompt of {segments[0].width} that was pruned between layers; leave past_key_values "
            "out, and the whole prompt is read again"
        )
    return segments


class Steps:
    """A pass over tokens that follow pruned prompts: masks and positions of every segment.

    Args:
        decoder: the layers.
        segments: of the prompts, see `segments_of`.
        cache: what begins with them.
        mask: the caller's [B, L + more] of the unpruned prompts; None where all that follows them
            counts.

    Attributes:
        all_count: whether all that follows the prompts counts.
    """

    def __init__(
        self, decoder: DecoderLayers, segments: list[Segment], cache: Any, mask: Tensor | None
    ) -> None:
        self._decoder, self._segments, self._cache = decoder, segments, cache
        more = None if mask is None or mask.ndim != 2 else mask[:, segments[0].width :].bool()
        self._more = None if more is None or bool(more.all()) else more
        self.all_count = self._more is None
        self._inputs: dict[int, dict[str, Any]] = {}

    def before_layer(
        self, layer: int, hidden: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """Return what a layer gets instead of its hidden states and inputs; None for the same.

        Raises:
            PruningError: rows are not of these prompts.
        """
        prompts = len(self._segments[0].columns)
        if len(hidden) % prompts:
            raise PruningError(
                f"the cache holds {prompts} prompts that were pruned between layers, but "
                f"{len(hidden)} rows go on from it; give one row for each"
            )
        segment = max((s for s in self._segments if s.first <= layer), key=lambda s: s.first)
        if segment.first == 0:
            return None
        if segment.first not in self._inputs:
            self._inputs[segment.first] = self._inputs_of(segment, hidden, inputs)
        return hidden, {**inputs, **self._inputs[segment.first]}

    def _inputs_of(
        self, segment: Segment, hidden: Tensor, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        rows, count = hidden.shape[:2]
        times = rows // len(segment.columns)
        seen = int(self._cache.get_seq_length(segment.first))
        mask = None
        if segment.padded or self._more is not None:
            more = self._more
            if more is None or more.shape[1] != seen - segment.width + count:
                more = segment.valid.new_ones(rows, seen - segment.width + count)
            valid = segment.valid.repeat_interleave(times, 0).to(hidden.device)
            mask = torch.cat([valid, more.to(hidden.device)], dim=1)
        own = {
            "attention_mask": self._decoder.attention_mask(hidden, mask, seen),
            "position_ids": None,
        }
        if segment.shift is not None:
            shift = segment.shift.repeat_interleave(times, 0)[:, None]
            positions = inputs["position_ids"].to(hidden.device) - shift.to(hidden.device)
            own["position_embeddings"] = self._decoder.rotary(hidden, positions)
        return own
