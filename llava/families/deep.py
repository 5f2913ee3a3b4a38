"""What a language model gets that neither `generate` nor the model around it passes on.

Visual features that a model adds to inner layers of its language model (DeepStack): a prompt of
embeddings comes without them. And the embeddings themselves, where a model's `generate` takes none.
A hook hands both over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class DeepFeatures(NamedTuple):
    """Features of a batch of pruned prompts.

    Attributes:
        visual: BoolTensor [B, L'], True for the tokens of images.
        levels: per inner layer [n, D], one row for every True of `visual`, row by row; may be none.
        embeds: [B, L', D] of the prompts, where they come as ids; None where they come as these.
    """

    visual: Tensor
    levels: list[Tensor]
    embeds: Tensor | None = None

    def row(self, number: int, start: int) -> DeepFeatures:
        """Return those of one row, from column `start` on."""
        counts = self.visual.sum(dim=1).tolist()
        first = sum(counts[:number])
        levels = [level[first : first + counts[number]] for level in self.levels]
        return DeepFeatures(self.visual[number : number + 1, start:], levels)

    def part(self, start: int, length: int, rows: int) -> dict[str, Any]:
        """Return the language model's arguments for `length` columns from `start` on.

        Args:
            start, length: columns of the prompt.
            rows: rows of the batch, a multiple of B where each is continued several times.
        """
        visual = self.visual[:, start : start + length]
        if not self.levels or not bool(visual.any()):
            return {}
        ranks = self.visual.flatten().cumsum(0).view_as(self.visual) - 1
        wanted = ranks[:, start : start + length]
        times = rows // len(visual)
        visual, wanted = visual.repeat_interleave(times, 0), wanted.repeat_interleave(times, 0)
        return {
            "visual_pos_masks": visual,
            "deepstack_visual_embeds": [level[wanted[visual]] for level in self.levels],
        }

    def embedded(self, start: int, given: Tensor) -> Tensor:
        """Return the embeddings of columns from `start` on, in place of those `given` [R, S, D]."""
        if self.embeds is None:
            return given
        own = self.embeds[:, start : start + given.shape[1]]
        own = own.to(given).repeat_interleave(len(given) // len(own), dim=0)
        return torch.cat([own, given[:, own.shape[1] :]], dim=1)


_deep: ContextVar[DeepFeatures | None] = ContextVar("deep features", default=None)


def hand_over(features: DeepFeatures | None) -> None:
    """Give the next prompt of this context these features; None for none."""
    _deep.set(features)


@contextmanager
def handing_over(features: DeepFeatures | None) -> Iterator[None]:
    """Give the prompt that is read inside these features."""
    token = _deep.set(features)
    try:
        yield
    finally:
        _deep.reset(token)


def hook_language_model(module: nn.Module) -> Any:
    """Put the hook on a language model; return its handle."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        features = _deep.get()
        if features is None or kwargs is None or kwargs.get("inputs_embeds") is None:
            return None
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        given = kwargs["inputs_embeds"]
        if start >= features.visual.shape[1]:
            return None
        embeds = features.embedded(start, given)
        inner = features.part(start, given.shape[1], given.shape[0])
        return args, {**kwargs, "inputs_embeds": embeds, **inner}

    return module.register_forward_pre_hook(before, with_kwargs=True)
