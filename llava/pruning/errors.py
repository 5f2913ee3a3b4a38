"""The one exception type of this package, and the "did you mean" wording it shares."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from llava.utils import UserInputError


class PruningError(UserInputError):
    """A pruning setting or input that cannot be honoured; the message says what would work."""


def unknown(kind: str, word: str, known: Iterable[str]) -> PruningError:
    """Error for an unknown `kind` of name, naming the nearest valid ones, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(name) for name in near) + "?"
    else:
        hint = "valid: " + (", ".join(names) if names else "none")
    return PruningError(f"unknown {kind} {word!r}; {hint}")
