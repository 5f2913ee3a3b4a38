"""MMBench without a language model as judge: which option does an answer name?

MMBench's evaluation first matches by rules and asks a GPT only about what is left. These are the
rules; what they cannot read is wrong here, so the figure is a lower bound of the server's. LLaVA
is asked for a letter and gives one, which makes the difference small.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_ARTICLE = re.compile(r"\bA(?=\s+(?!or\b|and\b)[a-z])")
_NEAR = 5  # words: a lone letter counts near the start or the end of an answer only


def match_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of `options` ({letter: option text}) that `text` names; None if it is unclear.

    First as a letter: the only option letter that stands alone in the answer, among its first or
    last five words ("A" directly before another word is the article, not a letter). Then as text:
    the only option whose text the answer holds, if the answer is at most twice as long as all
    options together.
    """
    words = _MARKS.sub(" ", _ARTICLE.sub(" ", text)).split()
    letters = {word for word in words if word in options}
    if len(letters) > 1:
        return None
    if letters:
        (letter,) = letters
        if words.index(letter) < _NEAR or words[::-1].index(letter) < _NEAR:
            return letter
    return _match_text(text, options)


def circular(
    groups: Sequence[Hashable], right: Sequence[bool], rotations: Sequence[int]
) -> dict[Hashable, bool]:
    """{question: right in every rotation of its options}, for questions asked in all of them.

    Args:
        groups [n]: the question that each answer belongs to.
        right [n]: whether the answer is right.
        rotations [n]: in how many rotations that question is asked; a question of which some are
            missing (a limited run) has no circular score.
    """
    seen: dict[Hashable, list[bool]] = {}
    wanted: dict[Hashable, int] = {}
    for group, value, count in zip(groups, right, rotations, strict=True):
        seen.setdefault(group, []).append(value)
        wanted[group] = count
    return {group: all(values) for group, values in seen.items() if len(values) == wanted[group]}


def _match_text(text: str, options: Mapping[str, str]) -> str | None:
    answer = text.lower()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    held = [letter for letter, option in options.items() if option.lower() in answer]
    return held[0] if len(held) == 1 else None
