"""Options of methods: declared in the class body, checked when a method is made."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from llava.pruning.errors import PruningError

_RULE = "rule"


@dataclass(frozen=True)
class _Rule:
    """The values that an option takes, beyond what its type says."""

    at_least: float | None
    at_most: float | None
    above: float | None
    below: float | None
    choices: tuple[str, ...]

    def check(self, name: str, value: object, hint: Any) -> None:
        """Raise PruningError unless an option annotated with `hint` can be `value`."""
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            return
        kind = get_origin(kinds[0]) or kinds[0]
        if not (value in self.choices if self.choices else self._fits(value, kind)):
            optional = " or None" if NoneType in kinds else ""
            near = difflib.get_close_matches(str(value), self.choices, n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            raise PruningError(
                f"{name} must be {self._describe(kind)}{optional}, got {value!r}{advice}"
            )

    def _fits(self, value: Any, kind: Any) -> bool:
        if kind not in (int, float):
            return kind not in (bool, Mapping) or isinstance(value, kind)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            return False
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _describe(self, kind: Any) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if kind in (bool, Mapping):
            return "true or false" if kind is bool else "a mapping of names to values"
        noun = "whole number" if kind is int else "number"
        sign = "positive " if self.above == 0 else ""
        limits = {
            "at least": self.at_least,
            "more than": self.above or None,
            "at most": self.at_most,
            "below": self.below,
        }
        words = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
        return f"a {sign}{noun}" + (f" of {' and '.join(words)}" if words else "")


def option(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare an option of a method: `steps: int = option(64, at_least=1)`.

    The annotation says what it takes: `int`, `float` (finite), `bool`, `str` (with `choices`), a
    mapping, or one of them `| None`.

    Args:
        default: value where none is given.
        default_factory: makes the default, for values that can be changed.
        at_least, at_most, above, below: limits of a number.
        choices: all values of a `str`.
    """
    rule = _Rule(at_least, at_most, above, below, choices)
    return field(default=default, default_factory=default_factory, metadata={_RULE: rule})


def check_options(method: Any) -> None:
    """Raise PruningError naming the first option of `method` with a value it does not take."""
    hints = get_type_hints(type(method))
    for declared in fields(method):
        if _RULE in declared.metadata:
            value = getattr(method, declared.name)
            declared.metadata[_RULE].check(declared.name, value, hints[declared.name])


class _ByOptions:
    def __init__(self, on_class: object, function: Callable[[Any], Any]) -> None:
        self._on_class, self._function = on_class, function

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self._on_class if instance is None else self._function(instance)


def by_options(on_class: object) -> Any:
    """Decorate a flag that depends on options: a property, with the value `on_class` on the class.

    `on_class` is what the table of methods shows, such as all inputs that some option needs.
    """
    return lambda function: _ByOptions(on_class, function)
