"""Record of what one call dropped between layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_marks: ContextVar[list[Any] | None] = ContextVar("decoder_marks", default=None)


@contextmanager
def marking(marks: list[Any] | None) -> Iterator[None]:
    """Let passes inside add a CUDA event before and one after what they do between layers.

    The host enqueues work and goes on, so its clock does not know how long a GPU takes.
    """
    token = _marks.set(marks)
    try:
        yield
    finally:
        _marks.reset(token)


def mark() -> None:
    """Add an event to the list of `marking`, if the caller is inside."""
    marks = _marks.get()
    if marks is not None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append(event)


@dataclass
class DecoderTrace:
    """Record of one prompt batch with I images and a language model of `depth` layers.

    Attributes:
        method: registered name.
        depth: layers.
        layers: before which tokens were dropped.
        per_layer: [I][depth], visual tokens of every image that a layer read, those made of others
            included.
        picks: for each cut LongTensor [I, K]: which of the tokens left before it stayed, ascending,
            padded with -1.
        cache_bytes: what keys and values of the prompts take, measured; None without a cache.
        seconds: wall clock on the host of scoring, selecting and gathering.
    """

    method: str
    depth: int
    layers: tuple[int, ...] = ()
    per_layer: list[list[int]] = field(default_factory=list)
    picks: list[Tensor] = field(default_factory=list)
    cache_bytes: int | None = None
    seconds: float = 0.0

    @property
    def tokens_in(self) -> list[int]:
        """Visual tokens of every image that the first layer read."""
        return [counts[0] for counts in self.per_layer]

    @property
    def tokens_last(self) -> list[int]:
        """Visual tokens of every image that the last layer read."""
        return [counts[-1] for counts in self.per_layer]

    @property
    def tokens_mean(self) -> list[float]:
        """Mean over layers of the visual tokens of every image that a layer read."""
        return [sum(counts) / self.depth for counts in self.per_layer]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "method": self.method,
            "layers": [*self.layers],
            "per_layer": self.per_layer,
            "picks": [[[i for i in row if i >= 0] for row in cut.tolist()] for cut in self.picks],
            "cache_bytes": self.cache_bytes,
            "seconds": self.seconds,
        }


def measure_cache(cache: Any) -> int | None:
    """Return the bytes of all keys and values of a cache; None where it does not show them."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    if any(part is None for part in parts):
        return None
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
