"""MMMU: options and open answers read from free text, as in the benchmark's own evaluation.

Source: behaviour of the official MMMU scripts as lmms-eval runs them, but for one thing: where no
option can be read they draw one from the global random state, and here it is drawn from the
question's id. So a score does not depend on what was scored before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

Value = str | float

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")  # in this order, each once
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+|[,\d])"),  # 12, 1.2, .2
)


def parse_choice(text: str, options: Mapping[str, str], question_id: str) -> str:
    """The letter of `options` ({letter: option text}) that `text` gives.

    Looked for in this order, the first kind that is found decides: "(A)", "A ", "A.", and in
    answers of more than five words the text of an option. Of several options the one that stands
    last is taken; without any, one drawn from `question_id`.
    """
    for mark in _STRIPPED:
        text = text.strip(mark)
    places = _places(f" {text} ", options)
    return max(places, key=places.__getitem__) if places else _draw(list(options), question_id)


def parse_open(text: str) -> set[Value]:
    """Candidates of an open answer: its key phrases and the numbers in them, normalised."""
    phrases = _key_phrases(text)
    numbers = [number for phrase in phrases for number in _numbers(phrase)]
    return {value for phrase in [*phrases, *numbers] for value in normalise(phrase)}


def open_is_correct(candidates: set[Value], references: Sequence[str]) -> bool:
    """Whether a number equals a reference, or a candidate's text holds one."""
    accepted = [value for reference in references for value in normalise(reference)]
    words = [value for value in accepted if isinstance(value, str)]
    return any(
        any(word in candidate for word in words)
        if isinstance(candidate, str)
        else candidate in accepted
        for candidate in candidates
    )


def normalise(text: str) -> list[Value]:
    """A number rounded to two decimals, or lower-case text.

    A single character comes with a space on either side, so that it only matches as a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _places(text: str, options: Mapping[str, str]) -> dict[str, int]:
    """{letter: its last place in `text`} by the first way of writing that finds any."""
    if found := [letter for letter in options if f"({letter})" in text]:
        return {letter: text.rfind(f"({letter})") for letter in found}
    for ending in " .":
        if found := [letter for letter in options if f"{letter}{ending}" in text]:
            # never finds "A.", so of several such options the first one wins, as published
            return {letter: text.rfind(f" {letter} ") for letter in found}
    if len(text.split()) <= 5:
        return {}
    lower = text.lower()
    names = {letter: option.lower() for letter, option in options.items()}
    return {letter: lower.rfind(name) for letter, name in names.items() if name in lower}


def _key_phrases(text: str) -> list[str]:
    """What follows an indicator word in each line, the shortest one of each; else all of it.

    An equals sign indicates too, in the last line. (The original also means to split at ends of
    sentences, by a capital after the period, but lowers the case before: nothing is split there.)
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        indicators = [*_INDICATORS, "="] if number == len(lines) else _INDICATORS
        tails = [line.split(word)[-1].strip() for word in indicators if word in line]
        shortest = ""
        for tail in tails:  # an empty tail gives way to the next one
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _STRIPPED:
            phrases.append(shortest)
    return phrases or [text]


def _numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _draw(letters: Sequence[str], question_id: str) -> str:
    digest = hashlib.sha256(question_id.encode()).digest()
    return letters[int.from_bytes(digest[:8], "big") % len(letters)]
