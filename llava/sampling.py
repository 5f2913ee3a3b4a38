"""How answers are drawn: decoding settings, and how they meet a model's generation_config."""

import math
from dataclasses import dataclass
from typing import Any

from llava.model.generation import unusable_settings
from llava.utils import UserInputError

# Answers are greedy long before this; logits divided by much less become inf or NaN.
LOWEST_TEMPERATURE = 1e-6

# Settings by which the rows of a batch would depend on each other: they end by more than an end
# token, and `min_length` counts the longest prompt.
_OF_A_BATCH = ("stop_strings", "max_time", "min_length")


@dataclass(frozen=True)
class Sampling:
    """Decoding settings, checked when they are made.

    Attributes:
        temperature: 0 is greedy, else the logits are divided by it: at least LOWEST_TEMPERATURE.
        top_p: sample from the likeliest tokens of this total probability, in (0, 1]; None: all.
        num_beams: beams of the search, at least 1.
        max_new_tokens: longest answer, at least 1.

    Raises:
        UserInputError: values outside.
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
        """Return keyword arguments of `generate`; they go before the model's generation_config."""
        sampled = self.temperature > 0
        return {
            "do_sample": sampled,
            "temperature": self.temperature if sampled else None,
            "top_p": self.top_p if sampled else None,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "max_length": None,  # with `max_new_tokens` it would only cause a warning
            "use_cache": True,
        }

    def arguments_for(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Return `arguments`, with what the generation_config of `model` needs to be carried out.

        Args:
            model: transformers' model.
            tokenizer: its tokenizer.

        Raises:
            UserInputError: as `check_model`.
        """
        self.check_model(model)
        return {
            **self.arguments(),
            "return_dict_in_generate": False,
            "tokenizer": tokenizer,  # for `stop_strings`
        }

    def check_model(self, model: Any) -> None:
        """Refuse a generation_config of `model` that cannot be carried out with these settings.

        Such a one asks for several answers to a prompt, or for a way of decoding that does not
        exist for prompts with images.

        Raises:
            UserInputError: names the setting.
        """
        config = model.generation_config
        settings = {**vars(config), **self.arguments()}
        refused = dict(unusable_settings(settings.get, model.device.type))
        if (config.num_return_sequences or 1) > 1:
            refused["num_return_sequences"] = "every question gets one answer"
        for name, reason in refused.items():
            raise UserInputError(
                f"the model's generation_config sets {name} to {settings[name]!r}, which cannot be "
                f"used here: {reason}; remove it from generation_config.json"
            )


def rows_depend(config: Any) -> bool:
    """Whether rows continued together would depend on each other, under a generation_config."""
    return any(getattr(config, name, None) for name in _OF_A_BATCH)


def _check(name: str, value: Any, what: str, kind: type, low: float, high: float) -> None:
    accepted = (int, float) if kind is float else (int,)
    right = isinstance(value, accepted) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        raise UserInputError(f"{name} must be {what}, got {value!r}")
