"""What a language model gets that the model around it does not pass on.

Visual features that a model adds to inner layers of its language model (DeepStack): a prompt of
embeddings comes without them. And the embeddings themselves, where `generate` takes none: that of
some models, and assisted decoding. A hook before the language model hands both over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.families.call_state import current_call


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
        embeds = None if self.embeds is None else self.embeds[number : number + 1, start:]
        return DeepFeatures(self.visual[number : number + 1, start:], levels, embeds)

    def part(self, start: int, length: int, rows: int) -> dict[str, Any]:
        """Return the language model's arguments for `length` columns from `start` on.

        Args:
            start, length: columns of the prompt and what follows it.
            rows: rows of the batch, a multiple of B where each is continued several times.
        """
        visual = self.visual[:, start : start + length]
        if not self.levels or not bool(visual.any()):
            return {}
        ranks = self.visual.flatten().cumsum(0).view_as(self.visual) - 1
        wanted = ranks[:, start : start + length]
        times = rows // len(visual)
        visual, wanted = visual.repeat_interleave(times, 0), wanted.repeat_interleave(times, 0)
        features = [level[wanted[visual]] for level in self.levels]
        visual = nn.functional.pad(visual, (0, length - visual.shape[1]))
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": features}

    def embedded(self, start: int, given: Tensor) -> Tensor:
        """Return the embeddings of columns from `start` on, in place of those `given` [R, S, D]."""
        if self.embeds is None:
            return given
        own = self.embeds[:, start : start + given.shape[1]]
        own = own.to(given).repeat_interleave(len(given) // len(own), dim=0)
        return torch.cat([own, given[:, own.shape[1] :]], dim=1)


# Without kwargs where another thread removes the hook at this moment.
@torch.compiler.disable
def before_language_model(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """Hand over what the current call has for this language model: its forward pre-hook."""
    call = current_call()
    if call is None or call.features is None or call.language_model is not module:
        return None
    given = None if kwargs is None else kwargs.get("inputs_embeds")
    if given is None:
        return None
    cache = kwargs.get("past_key_values")
    start = 0 if cache is None else int(cache.get_seq_length())
    features: DeepFeatures = call.features
    if start >= features.visual.shape[1]:
        return None
    embeds = features.embedded(start, given)
    inner = features.part(start, given.shape[1], given.shape[0])
    return args, {**kwargs, "inputs_embeds": embeds, **inner}
