"""How answers are drawn: the decoding settings of the chat and of single questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llava.utils import UserInputError

# Answers are greedy long before this; logits divided by much less are no numbers any more.
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """Decoding settings, checked when they are made.

    Attributes:
        temperature: 0 is greedy, else the logits are divided by it: at least LOWEST_TEMPERATURE.
        top_p: sample from the likeliest tokens of this total probability, in (0, 1]; None: all.
        num_beams: beams of the search, at least 1.
        max_new_tokens: longest answer, at least 1.

    Raises UserInputError for values outside.
    """

    temperature: float = 0.2
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a number of at least 0", float, 0, math.inf)
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise UserInputError(
                f"temperature {self.temperature!r} is too close to 0 to divide by; give 0, which "
                f"is greedy, or at least {LOWEST_TEMPERATURE:g}"
            )
        if self.top_p is not None:
            _check("top_p", self.top_p, "a share in (0, 1]", float, math.ulp(0), 1)
        for name in ("num_beams", "max_new_tokens"):
            _check(name, getattr(self, name), "a whole number of at least 1", int, 1, math.inf)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        sampled = self.temperature > 0
        return {
            "do_sample": sampled,
            "temperature": self.temperature if sampled else None,
            "top_p": self.top_p if sampled else None,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,
        }


def _check(name: str, value: Any, what: str, kind: type, low: float, high: float) -> None:
    accepted = (int, float) if kind is float else (int,)
    right = isinstance(value, accepted) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        raise UserInputError(f"{name} must be {what}, got {value!r}")
