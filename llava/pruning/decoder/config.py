"""DecoderConfig: which decoder method, its budget and options. Plain JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.pruning.budgets import BUDGETS, check_count, check_share
from llava.pruning.decoder.method import DecoderMethod
from llava.pruning.decoder.registry import make_decoder_method
from llava.pruning.decoder.schedule import Schedule
from llava.pruning.errors import PruningError
from llava.registry import unknown


@dataclass(frozen=True)
class DecoderConfig:
    """One setting of pruning inside the language model, checked when it is made.

    Attributes:
        method: a registered name, see `list_decoder_methods()`.
        keep_tokens: of one image, the mean over layers of the visual tokens that a layer reads,
            >= 1.
        keep_ratio: alternatively, that mean as a share in (0, 1] of the image's own tokens, as it
            has them without any pruning.
        options: options of the method, by field name of its class.

    Without a budget the method's published schedule counts, where it has one.

    Raises:
        PruningError: two budgets, none where one is needed, an unknown method or option.
    """

    method: str
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pruner: DecoderMethod = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise PruningError(
                f"options must be a mapping of names to values, got {self.options!r}"
            )
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "pruner", make_decoder_method(self.method, self.options))
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) == 2:
            raise PruningError("give keep_tokens or keep_ratio, not both")
        if not given and self.pruner.budgeted:
            raise PruningError(
                f"{self.method!r} needs keep_tokens= or keep_ratio= (--decoder-keep-tokens or "
                "--decoder-keep-ratio)"
            )
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", check_count(self.keep_tokens))
        if self.keep_ratio is not None:
            object.__setattr__(self, "keep_ratio", check_share("keep_ratio", self.keep_ratio))
        self.pruner.check_budget(bool(given))

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def budget(self, total: int) -> float | None:
        """Return the mean asked for of an image that has `total` tokens without any pruning."""
        if self.keep_ratio is not None:
            return max(1.0, self.keep_ratio * total)
        return self.keep_tokens

    def plan(self, tokens: int, total: int, depth: int) -> Schedule:
        """Return the schedule of one image: a pure function.

        Args:
            tokens: of the image where it enters the language model.
            total: its tokens without any pruning.
            depth: layers of the language model.

        Returns:
            A schedule without cuts where the budget holds all tokens.

        Raises:
            UnreachableBudgetError: the budget is below what the schedule can reach.
        """
        budget = self.budget(total)
        if tokens == 0 or (budget is not None and budget >= tokens):
            return Schedule((), ())
        return self.pruner.plan(tokens, depth, budget)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, such that `from_dict(config.to_dict()) == config`."""
        data: dict[str, Any] = {"method": self.method}
        for name in BUDGETS:
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        return data | ({"options": dict(self.options)} if self.options else {})

    @classmethod
    def read(cls, value: Any) -> DecoderConfig | None:
        """Read a setting as users write it: a DecoderConfig, its dict form, or None.

        Raises:
            PruningError: it is anything else, or has a key that does not exist.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or "method" not in value:
            raise PruningError(
                "decoder must be a DecoderConfig or its dict form, such as {'method': 'fastv', "
                f"'keep_tokens': 64}}, got {value!r}"
            )
        allowed = ("method", *BUDGETS, "options")
        for key in value:
            if key not in allowed:
                raise PruningError(unknown("decoder setting", key, allowed))
        return cls(**{**value, "options": value.get("options") or {}})
