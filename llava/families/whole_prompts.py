"""Give what callers bring to `generate` their own prompts instead of the pruned ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import BaseStreamer, StoppingCriteriaList


class WholePrompts:
    """The prompts of a caller, and the pruned ones that `generate` gets instead.

    Args:
        ids: LongTensor [B, L] of the caller.
        width: L', columns of the pruned prompts.
    """

    def __init__(self, ids: Tensor, width: int) -> None:
        self.ids, self.width = ids, width

    def restored(self, sequences: Tensor) -> Tensor:
        """Put the caller's prompts before what follows the pruned ones in sequences [R, L' + n]."""
        times = len(sequences) // len(self.ids)
        prompts = self.ids.to(sequences.device).repeat_interleave(times, dim=0)
        return torch.cat([prompts, sequences[:, self.width :]], dim=1)

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `generate` such that all count the caller's prompts."""
        changed = self._with_lengths(model, given)
        if changed.get("streamer") is not None:
            changed["streamer"] = _Streamer(changed["streamer"], self.ids)
        criteria = changed.get("stopping_criteria")
        if criteria is not None:
            own = [_Criterion(self, criterion) for criterion in _listed(criteria)]
            changed["stopping_criteria"] = StoppingCriteriaList(own)
        processors = changed.get("logits_processor")
        if processors is not None:
            own_processors = [_Processor(self, processor) for processor in _listed(processors)]
            changed["logits_processor"] = LogitsProcessorList(own_processors)
        allowed = changed.get("prefix_allowed_tokens_fn")
        if allowed is not None:
            changed["prefix_allowed_tokens_fn"] = self._allowed(allowed)
        return changed

    def _with_lengths(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Lower `max_length` and `min_length` by what the prompts lost."""
        changed, removed = dict(given), self.ids.shape[1] - self.width
        own = given.get("generation_config")
        for name in ("max_length", "min_length"):
            if given.get(name) is not None:
                changed[name] = max(given[name] - removed, 0)
            elif getattr(own, name, None) is not None:
                config = copy.deepcopy(changed["generation_config"])
                setattr(config, name, max(getattr(own, name) - removed, 0))
                changed["generation_config"] = config
            elif getattr(model.generation_config, name, None):
                changed[name] = max(getattr(model.generation_config, name) - removed, 0)
        return changed

    def _allowed(self, function: Callable[[int, Tensor], list[int]]) -> Any:
        def allowed(row: int, sequence: Tensor) -> list[int]:
            return function(row, torch.cat([self.ids[row].to(sequence), sequence[self.width :]]))

        return allowed


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


class _Streamer(BaseStreamer):
    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = ids

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class _Criterion(StoppingCriteria):
    def __init__(self, whole: WholePrompts, criterion: Any) -> None:
        self._whole, self._criterion = whole, criterion

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._criterion(self._whole.restored(input_ids), scores, **kwargs)


class _Processor(LogitsProcessor):
    def __init__(self, whole: WholePrompts, processor: Any) -> None:
        self._whole, self._processor = whole, processor

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._processor(self._whole.restored(input_ids), scores)
