"""Rules for single values of settings files: each is read as what it means, or refused in one line.

JSON of other programs writes `28.0` for 28 and 0 for false, and null for "not set". What is left
after that and does not fit is refused with the name of the key, the file and what it can be.
"""

import math
import numbers
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from llava.utils import UserInputError

_SHOWN = 60  # characters of a value in an error


class Rule(NamedTuple):
    """What one key can hold.

    Attributes:
        wanted: what to give instead of a value that does not fit.
        read: the value as it is used; raises ValueError or TypeError for one that does not fit.
    """

    wanted: str
    read: Callable[[Any], Any]


def read_values(
    values: Mapping[str, Any], rules: Mapping[str, Rule], place: str = "", advice: str = ""
) -> dict[str, Any]:
    """Copy `values`, with those that `rules` name read as they are used; None stays None.

    Args:
        values: settings by name; names without a rule are kept as they are.
        rules: what the settings can hold.
        place: where errors say the settings are, such as "in config.json"; empty where the names
            say it.
        advice: ends the errors, such as ", or remove it for the default".

    Raises:
        UserInputError: a value that does not fit its rule.
    """
    read = dict(values)
    for name, rule in rules.items():
        if read.get(name) is not None:
            try:
                read[name] = rule.read(read[name])
            except (ValueError, TypeError) as error:
                raise unfit(name, read[name], place, f"give {rule.wanted}{advice}") from error
    return read


def unfit(name: str, value: Any, place: str, remedy: str) -> UserInputError:
    """Make the one-line error about a value that cannot be used."""
    return UserInputError(f"{f'{name} {place}'.rstrip()} is {short_repr(value)}; {remedy}")


def short_repr(value: Any) -> str:
    """Return `repr(value)` on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def one_line(error: BaseException) -> str:
    """Return what an error of a library says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def library_errors(
    what: str, remedy: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Turn what a library raises about the user's files and settings into one line.

    Args:
        what: what cannot be done; the library's reason follows in brackets.
        remedy: what to do about it.
        errors: what the library raises, where that has a common base class.

    Raises:
        UserInputError: one of `errors` was raised inside.
    """
    try:
        yield
    except UserInputError:
        raise
    except errors as error:
        raise UserInputError(f"{what} ({one_line(error)}); {remedy}") from error


def check_characters(text: str, name: str) -> None:
    """Refuse text that was not decoded properly: no tokenizer and no file takes it.

    Args:
        text: any text.
        name: what errors call it.

    Raises:
        UserInputError: says what is not a character, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"{name} has {text[error.start]!r} at place {error.start}, which is not a character; "
            "write it in UTF-8"
        ) from error


def whole(low: int, high: int | None = None) -> Rule:
    """Make a rule for a whole number within bounds."""

    def read(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        fraction = isinstance(value, float) and value.is_integer()
        number = int(value) if fraction else operator.index(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    return Rule(f"a whole number {bounds}", read)


def number(low: float, high: float = math.inf, above: bool = False) -> Rule:
    """Make a rule for a finite number from `low` to `high`; `above` excludes `low` itself."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise ValueError
        return value

    bounds = f"above {low:g}" if above else f"of at least {low:g}"
    return Rule(f"a number {bounds}" + (f" and at most {high:g}" if high < math.inf else ""), read)


def list_of(rule: Rule, length: int | None = None, empty: bool = False) -> Rule:
    """Make a rule for a list of values that `rule` reads; `empty` allows one without values."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise TypeError
        if not value and not empty:
            raise ValueError
        return [rule.read(entry) for entry in value]

    count = "a list" if length is None else f"a list of {length}"
    return Rule(f"{count}, each {rule.wanted}", read)


def either(*rules: Rule) -> Rule:
    """Make a rule that takes what one of the rules reads, the first that fits."""

    def read(value: Any) -> Any:
        for rule in rules:
            try:
                return rule.read(value)
            except (ValueError, TypeError):
                continue
        raise ValueError

    return Rule(", or ".join(rule.wanted for rule in rules), read)


def one_of(values: Collection[str]) -> Rule:
    """Make a rule for one of a few words."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError
        return value

    return Rule(f"one of {', '.join(values)}", read)


def _read_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise ValueError


def _read_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


FLAG = Rule("true or false", _read_flag)
TEXT = Rule("a text", _read_text)
