"""Arms: the settings that one run compares, planned before the first question is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from llava.pruning import PruningConfig, get_method

UNPRUNED = "none"
CONTROL = "least-sensitive"
Control = Literal["image", "tokens"]


@dataclass(frozen=True)
class Arm:
    """One setting. `name` is unique in a run and stands in every record.

    `method`, `options` and a budget configure pruning: visual tokens kept per image (`budget`), or
    the share of them that is kept (`ratio`). `image` says which image the model is shown: the
    question's own, another question's, or none. `control` marks arms that should lose, by their
    image or by their tokens. `unavailable` is why an arm cannot run.
    """

    name: str
    label: str
    method: str = UNPRUNED
    budget: int | None = None
    image: Literal["own", "other", "absent"] = "own"
    control: Control | None = None
    unavailable: str | None = None
    ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def pruning(self, seed: int) -> PruningConfig | None:
        """The arm's setting, None without pruning; methods that draw at random take `seed`.

        Raises PruningError for settings that do not exist.
        """
        if self.method == UNPRUNED:
            return None
        seeded = any(option.name == "seed" for option in fields(get_method(self.method)))
        options = ({"seed": seed} if seeded else {}) | dict(self.options)
        return PruningConfig.of(
            self.method, keep_tokens=self.budget, keep_ratio=self.ratio, **options
        )


def without_impossible(
    arms: Sequence[Arm], refusal: Callable[[Arm], str | None]
) -> tuple[Arm, ...]:
    """The same arms; those that `refusal` gives a reason for are marked unavailable with it.

    It is not asked about arms that have a reason already.
    """
    return tuple(replace(arm, unavailable=arm.unavailable or refusal(arm)) for arm in arms)


def plan_arms(
    methods: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    impossible: Callable[[str, int], str | None],
    one_image: bool = False,
    label: Callable[[str], str] = str,
) -> tuple[Arm, ...]:
    """The unpruned arm, every method at every budget below `tokens`, then the controls.

    `tokens` is the number of visual tokens of an unpruned image: a budget that is not below it
    changes nothing and is the unpruned arm already. `impossible(method, budget)` returns why a
    method cannot keep exactly that many, or None; such an arm stays in the plan with its reason,
    and is never replaced by a neighbouring budget. `one_image` rules out the shuffled control.
    `label(method)` is what tables call a method.
    """
    smaller = sorted({budget for budget in budgets if budget < tokens}, reverse=True)

    def pruned(method: str, budget: int, control: Control | None = None) -> Arm:
        reason = impossible(method, budget)
        name = f"{method}@{budget}"
        return Arm(name, label(method), method, budget, control=control, unavailable=reason)

    # The unpruned arm and the control are in every plan already.
    named = [method for method in dict.fromkeys(methods) if method not in (UNPRUNED, CONTROL)]
    alone = "needs questions about two images" if one_image else None
    return (
        Arm(UNPRUNED, "none (unpruned)", budget=tokens),
        *(pruned(method, budget) for method in named for budget in smaller),
        *(pruned(CONTROL, budget, "tokens") for budget in smaller),
        Arm(
            "shuffled-image",
            "shuffled image",
            image="other",
            budget=tokens,
            control="image",
            unavailable=alone,
        ),
        Arm("no-image", "no image", image="absent", control="image"),
    )
