"""One turn of a chat: the answer as it streams, and a clock on every step of the pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import TextStreamer

from llava.eval.engine.decode import Stopwatch
from llava.pruning import VisualTokens


@dataclass(frozen=True)
class Cost:
    """Visual tokens of a turn, and milliseconds per step.

    Attributes:
        before, after: visual tokens of the image, and those the language model saw.
        encode, score, select: of the vision side.
        prefill: from the call to the first new token, without encoding and pruning; None if the
            turn was stopped before.
        per_token: mean over the tokens after the first; None if there was none.
    """

    before: int
    after: int
    encode: float
    score: float
    select: float
    prefill: float | None
    per_token: float | None

    def line(self) -> str:
        """Return the status line under an answer."""
        parts = [
            f"{self.before} -> {self.after} tokens ({100 * self.after / self.before:.1f} %)",
            f"encode {self.encode:.0f} ms",
            f"score {self.score:.1f}",
            f"select {self.select:.1f}",
        ]
        if self.prefill is not None:
            parts.append(f"prefill {self.prefill:.0f}")
        if self.per_token is not None:
            parts.append(f"{self.per_token:.1f} ms/token")
        return " | ".join(parts)


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
    """

    def __init__(self, tokenizer: Any, device: torch.device, silent: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.silent = silent
        self.tokens: list[int] = []
        self.laps: list[float] = []
        self._watch = Stopwatch(device)

    def put(self, value: torch.Tensor) -> None:
        if self.laps:  # the first call brings the prompt
            self.tokens += value.flatten().tolist()
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

    def cost(self, laps: Sequence[float]) -> Cost | None:
        """Return the cost of the turn whose streamer took these laps."""
        if "prune" not in self.tokens:
            return None
        before, after = (self.tokens[step].embeddings(0).shape[0] for step in ("encode", "prune"))
        trace = self.tokens["prune"].trace
        score, select = (trace.score_seconds, trace.select_seconds) if trace else (0.0, 0.0)
        vision = sum(self.milliseconds.values())
        prefill = sum(laps[:2]) - vision if len(laps) > 1 else None
        per_token = fmean(laps[2:]) if len(laps) > 2 else None
        encode = self.milliseconds["encode"]
        return Cost(before, after, encode, 1000 * score, 1000 * select, prefill, per_token)
