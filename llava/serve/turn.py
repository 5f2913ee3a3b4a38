"""One turn of a chat: the answer as it streams, and a clock on every step of the pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from transformers import DynamicCache, TextStreamer

from llava.eval.engine.decode import Stopwatch
from llava.pruning import VisualTokens
from llava.pruning.decoder.trace import DecoderTrace, measure_cache


@dataclass(frozen=True)
class Cost:
    """Visual tokens of a turn, and milliseconds per step.

    Attributes:
        before, after: visual tokens of the image, and those the language model saw.
        encode, score, select: of the vision side.
        prefill: from the call to the first new token, without encoding and pruning; None if the
            turn was stopped before.
        per_token: mean over the tokens after the first; None if there was none.
        last, mean: visual tokens that the last layer read, and the mean over layers, where tokens
            are dropped between layers; None elsewhere.
        cache_bytes: measured size of the key cache of the prompt; None where it cannot be seen.
    """

    before: int
    after: int
    encode: float
    score: float
    select: float
    prefill: float | None
    per_token: float | None
    last: int | None = None
    mean: float | None = None
    cache_bytes: int | None = None

    @property
    def pruned(self) -> bool:
        """Whether some layer read fewer tokens than the image has."""
        return self.after < self.before or (self.last is not None and self.last < self.after)

    def tokens(self) -> str:
        """Return the tokens that the language model saw, such as `192 -> 21 (mean 63.8)`."""
        if self.last is None:
            return str(self.after)
        return f"{self.after} -> {self.last} (mean {self.mean:.1f})"

    def line(self) -> str:
        """Return the status line under an answer."""
        within = ""
        if self.last is not None:
            within = f" -> {self.last} in the last layer (mean over layers {self.mean:.1f})"
        share = 100 * self.after / self.before
        parts = [
            f"{self.before} -> {self.after} tokens ({share:.1f} %){within}",
            f"encode {self.encode:.0f} ms",
            f"score {self.score:.1f}",
            f"select {self.select:.1f}",
        ]
        if self.prefill is not None:
            parts.append(f"prefill {self.prefill:.0f}")
        if self.per_token is not None:
            parts.append(f"{self.per_token:.1f} ms/token")
        if self.cache_bytes is not None:
            parts.append(f"KV cache {describe_bytes(self.cache_bytes)}")
        return " | ".join(parts)


def describe_bytes(count: int) -> str:
    """Return `3.9 MB` or `317 kB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def new_cache(model: Any) -> DynamicCache | None:
    """Make the key cache that `generate` makes itself by default, so that it can be measured.

    Returns:
        None where the model's generation_config or its class wants another one.
    """
    config = model.generation_config
    if config.cache_implementation is not None or config.use_cache is False:
        return None
    if not model._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@dataclass(frozen=True)
class Turn:
    """One answer.

    Attributes:
        setting: how the image was pruned, in a few words.
        answer: the text, as far as it came.
        stopped: whether the user stopped it.
        first: whether it is the first of its session, so that its times include warming up.
        cost, visual: None if it was stopped before the image was encoded.
        full: whether it used up the model's positions, so that no other turn fits after it.
    """

    setting: str
    answer: str
    stopped: bool
    first: bool
    cost: Cost | None
    visual: VisualTokens | None
    full: bool = False

    def status(self) -> str:
        """Return the line under the answer."""
        parts = [self.cost.line()] if self.cost is not None else []
        parts += ["stopped"] if self.stopped else []
        parts += ["the context is full; /reset starts again"] if self.full else []
        return " | ".join(parts)


class ClockedStreamer(TextStreamer):
    """Collect the tokens of one row, time each, and print their text.

    Attributes:
        tokens: new ones.
        laps: ms up to the prompt, and up to every new token after that.
        cache_bytes: size of `cache` with the prompt in it.
    """

    def __init__(
        self,
        tokenizer: Any,
        device: torch.device,
        silent: bool = False,
        cache: DynamicCache | None = None,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.silent = silent
        self.cache = cache
        self.cache_bytes: int | None = None
        self.tokens: list[int] = []
        self.laps: list[float] = []
        self._watch = Stopwatch(device)

    def put(self, value: torch.Tensor) -> None:
        if self.laps:  # the first call brings the prompt
            self.tokens += value.flatten().tolist()
        if len(self.laps) == 1:  # the first new token is not in the cache yet
            self.cache_bytes = measure_cache(self.cache)
        self.laps.append(self._watch.lap())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.silent:
            super().on_finalized_text(text, stream_end)


class PipelineClock:
    """Time the encode and prune steps of one call and keep the tokens they produced."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds = {"encode": 0.0, "prune": 0.0}
        self.tokens: dict[str, VisualTokens] = {}

    def run(self, name: str, step: Callable[..., VisualTokens], *arguments: Any) -> VisualTokens:
        """Run a step of the pipeline and time it; see `llava.model.call_context`."""
        watch = Stopwatch(self.device)
        self.tokens[name] = step(*arguments)
        self.milliseconds[name] += watch.lap()
        return self.tokens[name]

    def cost(
        self, laps: Sequence[float], dropped: DecoderTrace | None, cache_bytes: int | None
    ) -> Cost | None:
        """Return the cost of a turn.

        Args:
            laps: of its streamer.
            dropped: what it dropped between layers.
            cache_bytes: size of the key cache of its prompt.
        """
        if "prune" not in self.tokens:
            return None
        before, after = (self.tokens[step].embeddings(0).shape[0] for step in ("encode", "prune"))
        trace = self.tokens["prune"].trace
        score, select = (trace.score_seconds, trace.select_seconds) if trace else (0.0, 0.0)
        vision = sum(self.milliseconds.values())
        prefill = sum(laps[:2]) - vision if len(laps) > 1 else None
        per_token = fmean(laps[2:]) if len(laps) > 2 else None
        encode = self.milliseconds["encode"]
        last = mean = None
        if dropped is not None:
            (last,), (mean,) = dropped.tokens_last, dropped.tokens_mean
        cost = Cost(before, after, encode, 1000 * score, 1000 * select, prefill, per_token)
        return replace(cost, last=last, mean=mean, cache_bytes=cache_bytes)
