"""Greedy decoding with a clock: the same tokens as `model.generate`, and when the first one came.

`generate` hides where prefill ends. Timing it from outside would need a second forward pass per
question, so the loop is written out here; a test holds it equal to `model.generate`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Stopwatch:
    """Milliseconds since creation, or since the last lap, with all work of `device` finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def lap(self) -> float:
        """Milliseconds since the previous lap; starts the next one."""
        now = self._now()
        elapsed, self._start = now - self._start, now
        return 1000 * elapsed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Decoded:
    """New tokens of each row up to its end token, and the time of the whole batch in ms."""

    tokens: list[list[int]]
    prefill_ms: float  # embeddings in, first new token out
    step_ms: float | None  # mean time of a later step; None if there was none


@torch.inference_mode()
def greedy_decode(
    model: nn.Module,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    *,
    end_tokens: Iterable[int],
    max_new_tokens: int,
) -> Decoded:
    """Continue `inputs_embeds` [B, L, D], left-padded under `attention_mask` [B, L], greedily.

    `position_ids` [B, L] default to the running count of real tokens; decoding goes on from the
    last position. A row stops at one of `end_tokens`, which is not returned, or after
    `max_new_tokens`.
    """
    mask = attention_mask.long()
    if position_ids is None:
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(end_tokens), device=mask.device)
    clock = Stopwatch(mask.device)
    output = model(
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    token = output.logits[:, -1].argmax(-1)
    prefill_ms = clock.lap()
    steps = [token]
    position = position_ids.amax(-1, keepdim=True)
    finished = torch.isin(token, ends)
    while len(steps) < max_new_tokens and not finished.all():
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        token = output.logits[:, -1].argmax(-1)
        finished = finished | torch.isin(token, ends)
        steps.append(token)
    later = len(steps) - 1
    step_ms = clock.lap() / later if later else None
    rows = torch.stack(steps, dim=1).tolist()
    stop = set(ends.tolist())
    return Decoded([_until(row, stop) for row in rows], prefill_ms, step_ms)


def _until(row: list[int], stop: set[int]) -> list[int]:
    """`row` before its first token in `stop`."""
    for position, token in enumerate(row):
        if token in stop:
            return row[:position]
    return row
