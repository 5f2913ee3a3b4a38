"""Options of methods: declared in the class body, checked when a method is made."""

import difflib
import math
import operator
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from llava.pruning.errors import PruningError

# Limit of a number -> how it is compared and said.
_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "at_least": (operator.ge, "of at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def option(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare an option of a method: `directions: int = option(64, at_least=1)`.

    The annotation says what it takes: `int`, `float` (finite), `bool`, `str` (with `choices`), a
    mapping, a list of numbers (`tuple[int, ...]`), or one of them `| None`.

    Args:
        default: value where none is given.
        default_factory: makes the default, where that is a value that can be changed.
        choices: all values of a `str`.
        at_least, above, at_most, below: limits of a number, or of all in a list.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    rule = {"choices": choices, "limits": given}
    return field(default=default, default_factory=default_factory, metadata=rule)


def check_options(method: Any) -> None:
    """Raise PruningError naming the first option of `method` with a value it does not take."""
    declared = [field for field in fields(method) if field.metadata]
    hints = _hints(method.__class__) if declared else {}
    for option in declared:
        _check(option.name, getattr(method, option.name), hints[option.name], **option.metadata)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _check(
    name: str, value: Any, hint: Any, choices: tuple[str, ...], limits: dict[str, float]
) -> None:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = get_origin(kinds[0]) or kinds[0]
    advice = ""
    if choices:
        fits, wanted = value in choices, f"one of {', '.join(choices)}"
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        advice = f"; did you mean {near[0]!r}?" if near else ""
    elif kind in (int, float):
        fits = _is_number(value, kind) and all(
            _LIMITS[word][0](value, limit) for word, limit in limits.items()
        )
        words = " and ".join(f"{_LIMITS[word][1]} {limit}" for word, limit in limits.items())
        wanted = f"a {'whole number' if kind is int else 'number'} {words}".rstrip()
        wanted = wanted.replace("number above 0", "positive number")
    elif kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is tuple:
        number = get_args(kinds[0])[0]
        fits = isinstance(value, list | tuple) and all(
            _is_number(one, number) and all(_LIMITS[w][0](one, v) for w, v in limits.items())
            for one in value
        )
        words = " and ".join(f"{_LIMITS[word][1]} {limit}" for word, limit in limits.items())
        wanted = f"a list of {'whole numbers' if number is int else 'numbers'} {words}".rstrip()
    elif kind is str:
        fits, wanted = isinstance(value, str), "text"
    else:
        fits, wanted = isinstance(value, kind), "a mapping of names to values"
    if NoneType in kinds:
        fits, wanted = fits or value is None, f"{wanted} or None"
    if not fits:
        raise PruningError(f"{name} must be {wanted}, got {value!r}{advice}")


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


class _Varying:
    def __init__(self, on_class: object, function: Callable[[Any], Any]) -> None:
        self._on_class, self._function = on_class, function

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self._on_class if instance is None else self._function(instance)


def varies(on_class: object) -> Any:
    """Decorate a flag that varies with the options: a property, with `on_class` on the class.

    `on_class` is what the table of methods shows, such as all inputs that some option needs.
    """
    return lambda function: _Varying(on_class, function)
