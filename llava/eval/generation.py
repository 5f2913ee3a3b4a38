"""Decoding of spliced prompts: greedy with a clock, or as `generate` samples and searches.

`generate` hides where prefill ends. Timing it from outside would need a second forward pass per
question, so the greedy loop is written out here; a test holds it equal to `model.generate`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from llava.sampling import Sampling


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
    prefill_ms: float | None = None  # embeddings in, first new token out; None: not measured
    step_ms: float | None = None  # mean time of a later step; None: there was none


@torch.inference_mode()
def decode(
    model: nn.Module,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    *,
    sampling: Sampling,
    end_tokens: Iterable[int],
    seeds: Sequence[int],
) -> Decoded:
    """Continue `inputs_embeds` [B, L, D], left-padded under `attention_mask` [B, L].

    Greedy prompts go through `greedy_decode`, beam search through `generate`. Where tokens are
    drawn, each row is continued alone, its draws seeded by its entry of `seeds` [B], so that they
    depend neither on the batch nor on what was drawn before; no global generator is moved.
    """
    if sampling.temperature == 0 and sampling.num_beams == 1:
        return greedy_decode(
            model,
            inputs_embeds,
            attention_mask,
            position_ids,
            end_tokens=end_tokens,
            max_new_tokens=sampling.max_new_tokens,
        )
    ends = sorted(end_tokens)

    def generate(rows: slice, start: int) -> list[list[int]]:
        positions = None if position_ids is None else position_ids[rows, start:]
        output = GenerationMixin.generate(
            model,
            inputs_embeds=inputs_embeds[rows, start:],
            attention_mask=attention_mask[rows, start:],
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **({} if positions is None else {"position_ids": positions}),
            **sampling.arguments(),
        )
        return [_until(row, set(ends)) for row in output.tolist()]

    if sampling.temperature == 0:
        return Decoded(generate(slice(None), 0))
    device = inputs_embeds.device
    tokens: list[list[int]] = []
    for row, seed in enumerate(seeds):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            padding = int((attention_mask[row] == 0).sum())
            tokens += generate(slice(row, row + 1), padding)
    return Decoded(tokens)


def row_seed(seed: int, index: int) -> int:
    """Seed of the draws for the item at `index`."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


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
