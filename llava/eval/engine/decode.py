"""Decoding of spliced prompts with `generate`, timed from inside.

transformers' own `generate` continues the prompts, so that whatever the checkpoint's
generation_config.json says holds in an evaluation too. A streamer notes when every token arrives,
because `generate` hides where prefill ends.
"""

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from llava.families.contract import ModelInputs, VisionLanguageModel
from llava.pruning.active import PruningRun
from llava.pruning.decoder.trace import DecoderTrace
from llava.sampling import Sampling, rows_depend
from llava.utils import UserInputError
from llava.value_rules import one_line


class Stopwatch:
    """Measures milliseconds since its creation or last lap, with all work of `device` done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def lap(self) -> float:
        """Return the milliseconds since the previous lap, and start the next one."""
        now = self._now()
        elapsed, self._start = now - self._start, now
        return 1000 * elapsed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class StepClock(BaseStreamer):
    """Notes how long every step of one `generate` call takes.

    Attributes:
        laps: ms up to the prefill, of the prefill with its token, and of every later step.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Stopwatch(device)
        self.laps: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take note of the prompt, at the first call, or of the new token of every row."""
        self.laps.append(self._clock.lap())

    def end(self) -> None:
        """Do nothing: every step is noted by then."""


@dataclass
class LayerCounts:
    """What layers read of the prompts of a batch, where tokens are dropped between layers.

    Attributes:
        per_layer: for every prompt its visual tokens by layer; empty for one without images.
        cache_bytes: measured size of the key cache of all prompts.
        seconds: of scoring, selecting and gathering.
    """

    per_layer: list[list[int]]
    cache_bytes: int = 0
    seconds: float = 0.0

    def add(self, first: int, prompts: ModelInputs, trace: DecoderTrace) -> None:
        """Add the record of `prompts`, the first of which is prompt `first` of the batch."""
        assert prompts.columns is not None  # because something was pruned
        for row, counts in zip(prompts.columns.rows, trace.per_layer, strict=False):  # of one beam
            own = self.per_layer[first + row] or [0] * trace.depth
            self.per_layer[first + row] = [a + b for a, b in zip(own, counts, strict=True)]
        self.cache_bytes += trace.cache_bytes or 0
        self.seconds += trace.seconds


@dataclass(frozen=True)
class Decoded:
    """New tokens of each row up to its end token, and the time of the whole batch in ms.

    An end token that answers show, because the tokenizer does not call it special, is in its row.
    """

    tokens: list[list[int]]
    prefill_ms: float | None = None  # embeddings in, first new token out; None: not measured
    step_ms: float | None = None  # mean time of a later step; None: there was none
    layers: LayerCounts | None = None  # None: no run was given


@torch.inference_mode()
def decode(
    subject: VisionLanguageModel,
    inputs: ModelInputs,
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    run: PruningRun | None = None,
) -> Decoded:
    """Continue the prompts `inputs`.

    Where tokens are drawn, or a setting would let rows depend on each other, each row is continued
    alone, its draws seeded by its entry of `seeds` [B], so that they depend neither on the batch
    nor on what was drawn before; no global generator is moved. Beam search is not timed.

    `run` is that of the block around the call, where its setting drops tokens between layers.

    Raises:
        UserInputError: the model's generation_config cannot be used, see `Sampling.arguments_for`.
    """
    device, config = inputs.embeds.device, subject.model.generation_config
    arguments = sampling.arguments_for(subject.model, subject.tokenizer)
    ends, special = end_tokens(config), subject.tokenizer.all_special_ids
    arguments["pad_token_id"] = min(ends, default=0)
    clocks: list[StepClock] = []
    layers = None if run is None else LayerCounts([[] for _ in inputs.lengths])

    def generate(prompts: ModelInputs, first: int = 0) -> list[list[int]]:
        own = dict(arguments)
        if sampling.num_beams == 1:
            clocks.append(StepClock(device))
            own["streamer"] = clocks[-1]
        try:
            output = subject.generate(prompts, **own)
        except UserInputError:
            raise
        except ValueError as error:  # as of a penalty below 0, set after the model was loaded
            raise UserInputError(
                f"the model's generation_config cannot be used: {one_line(error)}"
            ) from error
        if run is not None and layers is not None and run.decoder_trace is not None:
            layers.add(first, prompts, run.decoder_trace)
            run.decoder_trace = None
        return [until_end(row, ends, special) for row in output.tolist()]

    if sampling.temperature == 0 and not rows_depend(config):
        return Decoded(generate(inputs), *_times(clocks), layers)
    tokens: list[list[int]] = []
    for row, seed in enumerate(seeds):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens += generate(inputs.row(row), row)
    return Decoded(tokens, *_times(clocks), layers)


def row_seed(seed: int, index: int) -> int:
    """Return the seed of the draws for the item at `index`."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def end_tokens(generation_config: Any) -> set[int]:
    """Return the ids that end an answer."""
    ends = generation_config.eos_token_id
    return set(ends if isinstance(ends, list | tuple) else [ends]) - {None}


def until_end(row: Sequence[int], ends: Collection[int], special: Collection[int]) -> list[int]:
    """Cut `row` after its first token in `ends`; that token goes too if it is in `special`."""
    for position, token in enumerate(row):
        if token in ends:
            return list(row[: position + (token not in special)])
    return list(row)


def _times(clocks: Sequence[StepClock]) -> tuple[float | None, float | None]:
    """Return prefill and mean later step of a batch, from the clocks of its calls."""
    if not clocks:
        return None, None
    later = [lap for clock in clocks for lap in clock.laps[2:]]
    prefill = sum(clock.laps[1] for clock in clocks)
    return prefill, len(clocks) * fmean(later) if later else None
