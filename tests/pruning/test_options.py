"""Options of methods: declared once, checked once, and flags that vary with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pruning_checks as checks
import pytest

from llava.pruning import PruningConfig, PruningError, get_method
from llava.pruning.method import PruningMethod, option, varies


class Declares(PruningMethod):
    """A method with one option of every kind; `register` makes it a dataclass."""

    name = "declares"

    count: int = option(3, at_least=1, at_most=9)
    share: float = option(0.5, at_least=0, below=1)
    step: float = option(0.1, above=0)
    far: float = option(5, above=4)
    rank: int | None = option(None, at_least=1)
    rule: str = option("greedy", choices=("greedy", "random"))
    shuffle: bool = option(False)
    extra: Mapping[str, Any] = option(default_factory=dict)
    unchecked: int = 7

    @varies(("features", "cls_attention"))
    def needs(self) -> tuple[str, ...]:
        return ("cls_attention",) if self.shuffle else ("features",)


@pytest.fixture(autouse=True)
def declared():
    with checks.registered(Declares):
        yield


def of(**options: object) -> PruningMethod:
    return PruningConfig.of("declares", keep_tokens=1, **options).pruner


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be a whole number of at least 1 and at most 9, got 0"),
        ("count", 10, "at most 9"),
        ("count", 3.0, "whole number"),
        ("count", True, "whole number"),
        ("count", None, "whole number"),
        ("share", 1, "share must be a number of at least 0 and below 1, got 1"),
        ("share", math.nan, "below 1, got nan"),
        ("share", "0.5", "got '0.5'"),
        ("step", 0, "step must be a positive number, got 0"),
        ("step", math.inf, "a positive number, got inf"),
        ("far", 4, "far must be a number above 4, got 4"),
        ("rank", 0, "rank must be a whole number of at least 1 or None, got 0"),
        ("rule", "greedi", "one of greedy, random, got 'greedi'; did you mean 'greedy'?"),
        ("rule", None, "one of greedy, random, got None"),
        ("rule", ["greedy"], "one of greedy, random, got"),
        ("shuffle", 1, "shuffle must be true or false, got 1"),
        ("extra", [1], "extra must be a mapping of names to values, got"),
    ],
)
def test_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(PruningError) as refused:
        of(**{name: value})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("count", 1), ("count", 9), ("share", 0), ("share", 0.999), ("step", 1), ("far", 4.5)),
        *(("rank", None), ("rank", 10**400), ("rule", "random"), ("shuffle", True)),
        *(("extra", {"a": 1}), ("unchecked", "anything")),
    ],
)
def test_taken(name: str, value: object) -> None:
    assert getattr(of(**{name: value}), name) == value


def test_defaults_and_equality() -> None:
    assert of() == of(count=3) != of(count=4)
    assert of().extra == {} and of().extra is not of().extra
    with pytest.raises(AttributeError):
        of().count = 4


def test_a_flag_that_varies_shows_all_on_the_class() -> None:
    assert get_method("declares").needs == ("features", "cls_attention")
    assert of().needs == ("features",)
    assert of(shuffle=True).needs == ("cls_attention",)
