"""The arms of a bench: the unpruned model, a pruner that costs nothing, and methods x budgets."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.eval.engine.request import UNPRUNED, arm_word, split_word
from llava.pruning import PruningConfig, PruningError

FREE = "free"
_BUDGET = re.compile(r"@[\d.e+-]+$")  # at the end of an arm's name


@dataclass(frozen=True)
class BenchArm:
    """One setting of a bench.

    Attributes:
        name: `none`, `free@64`, `zoo@64`, `zoo:directions=32@64`.
        pruning: the setting. Of a free arm, the one that says how many tokens are kept.
        free: the indices are given and the arm only gathers.
    """

    name: str
    pruning: PruningConfig | None = None
    free: bool = False

    @property
    def budget(self) -> int | None:
        """Tokens to keep of an image; None without pruning."""
        return None if self.pruning is None else self.pruning.keep_tokens

    @property
    def decoder(self) -> Any:
        """What is dropped between layers; None for nothing."""
        return getattr(self.pruning, "decoder", None)  # older checkouts know none

    @property
    def method(self) -> str:
        """The name without the budget."""
        return _BUDGET.sub("", self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, which `from_dict` reads."""
        pruning = None if self.pruning is None else self.pruning.to_dict()
        return {"name": self.name, "pruning": pruning, "free": self.free}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BenchArm":
        """Read `to_dict()` output."""
        return cls(data["name"], PruningConfig.read(data["pruning"]), data["free"])


def split_method(word: str) -> tuple[str, dict[str, Any]]:
    """Split `zoo:directions=32` into the name of a method and its options.

    Raises:
        PruningError: there is a budget, or it is not written so.
    """
    method, budget, options = split_word(word)
    if budget is not None:
        raise PruningError(
            f"{word!r} has a budget; give methods alone, and budgets to --keep-tokens"
        )
    return method, options


def make_arms(
    methods: Sequence[str],
    budgets: Sequence[int],
    choices: Mapping[str, Any],
    between: Sequence[Any] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[BenchArm]:
    """Return all arms in the order in which they are run.

    Args:
        methods: `zoo` or `zoo:directions=32`; `none` for what `between` does alone.
        budgets: tokens to keep of an image.
        choices: settings of the stage for every method, such as `allocation`.
        between: what is dropped between layers behind every method that prunes before them, each a
            DecoderConfig, in arms of their own. Those with as many tokens as the method keeps are
            left out, because they would drop nothing.
        say: takes one line that names arms which are left out.

    Raises:
        PruningError: a method or an option that does not exist, a budget among the words, or
            settings that do not go together.
    """
    arms = [BenchArm(UNPRUNED)]
    free = {name: choices[name] for name in ("allocation", "newline") if name in choices}
    for budget in budgets:
        arms.append(
            BenchArm(f"{FREE}@{budget}", PruningConfig.of("grid", keep_tokens=budget, **free), True)
        )
    idle: list[str] = []
    for word in dict.fromkeys(methods):
        if word == UNPRUNED:
            arms += [BenchArm(_word(own), PruningConfig(decoder=own, **choices)) for own in between]
            continue
        method, options = split_method(word)
        for budget in budgets:
            config = PruningConfig.of(method, keep_tokens=budget, **options, **choices)
            arms.append(BenchArm(f"{word}@{budget}", config))
            if config.decoder is None:
                arms += _behind(arms[-1], between, idle)
    if idle:
        say(f"left out, because they would drop nothing between layers: {', '.join(idle)}")
    return list({arm.name: arm for arm in arms}.values())


def _behind(arm: BenchArm, between: Sequence[Any], idle: list[str]) -> list[BenchArm]:
    """Return an arm with settings between layers behind it: `zoo@192+fastv@64`.

    Names of those that would drop nothing go to `idle` instead.
    """
    assert arm.pruning is not None and arm.budget is not None
    made = []
    for decoder in between:
        name = f"{arm.name}+{_word(decoder)}"
        if decoder.keep_tokens is not None and decoder.keep_tokens >= arm.budget:
            idle.append(name)
        else:
            made.append(BenchArm(name, replace(arm.pruning, decoder=decoder)))
    return made


def _word(decoder: Any) -> str:
    """Return the text of a setting between layers: `fastv`, `fastv@64` or `fastv@0.25`."""
    budget = decoder.keep_tokens if decoder.keep_ratio is None else decoder.keep_ratio
    return arm_word(decoder.method, budget, decoder.options)
