"""The arms of a bench: the unpruned model, a pruner that costs nothing, and methods x budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.eval.engine.request import UNPRUNED, arm_word, split_word
from llava.pruning import PruningConfig, PruningError

FREE = "free"


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
        return self.name.rpartition("@")[0] or self.name

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
) -> list[BenchArm]:
    """Return all arms in the order in which they are run.

    Args:
        methods: `zoo` or `zoo:directions=32`.
        budgets: tokens to keep of an image.
        choices: settings of the stage for every method, such as `allocation`.
        between: what is dropped between layers behind every method that prunes before them, each a
            DecoderConfig with `keep_tokens`, in arms of their own. Those that keep no fewer than
            the method itself are left out, because they would drop nothing.

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
    for word in dict.fromkeys(methods):
        method, options = split_method(word)
        for budget in budgets:
            config = PruningConfig.of(method, keep_tokens=budget, **options, **choices)
            arms.append(BenchArm(f"{word}@{budget}", config))
            if config.decoder is None:
                arms += _behind(arms[-1], between)
    return arms


def _behind(arm: BenchArm, between: Sequence[Any]) -> list[BenchArm]:
    """Return an arm with settings between layers behind it: `zoo@192+fastv@64`."""
    assert arm.pruning is not None and arm.budget is not None
    made = []
    for decoder in between:
        if decoder.keep_tokens < arm.budget:
            name = f"{arm.name}+{arm_word(decoder.method, decoder.keep_tokens, decoder.options)}"
            made.append(BenchArm(name, replace(arm.pruning, decoder=decoder)))
    return made
