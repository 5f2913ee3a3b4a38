"""Arms that drop tokens between layers: what their language model read, and what cuts cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache

from llava.model.between_layers import reading_columns
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.trace import DecoderTrace, marking

__all__ = ["Between", "between_layers", "reading_columns"]


@dataclass
class Between:
    """What one pass over prompts dropped between layers.

    Attributes:
        cache: what the pass is to fill, and decoding goes on from.
        cuda: whether the device's own time is taken, by events around every cut.
        trace: set when the pass is over.
    """

    cache: Any
    cuda: bool
    trace: DecoderTrace | None = None
    events: list[Any] = field(default_factory=list)

    def milliseconds(self) -> float:
        """Return what scoring, selecting and gathering took; all work must be done."""
        assert self.trace is not None
        if not self.cuda:
            return 1000 * self.trace.seconds
        pairs = zip(self.events[::2], self.events[1::2], strict=True)
        return float(sum(start.elapsed_time(end) for start, end in pairs))

    def layer_tokens(self) -> list[int]:
        """Count the visual tokens that every layer read, of the image that kept the most."""
        assert self.trace is not None
        return [max(counts) for counts in zip(*self.trace.per_layer, strict=True)]


@contextmanager
def between_layers(
    model: Any, setting: DecoderConfig, columns: Sequence[VisualColumns], *, timed: bool = True
) -> Iterator[Between]:
    """Let passes of a model inside prune between layers, as `generate` does.

    Args:
        model: a LLaVA.
        setting: what is dropped.
        columns: where visual tokens stand in the prompts.
        timed: take times on CUDA.
    """
    own = Between(DynamicCache(config=model.config), timed and model.device.type == "cuda")

    def done(trace: DecoderTrace) -> None:
        own.trace = trace

    layers = TransformersDecoder(model.get_model())
    pruned = decoding(layers, setting, columns[0], generating=True, done=done)
    with marking(own.events if own.cuda else None), pruned:
        yield own
