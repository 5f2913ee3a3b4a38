"""The one exception type of this package."""

from __future__ import annotations

from collections.abc import Iterable

from llava import registry
from llava.utils import UserInputError


class PruningError(UserInputError):
    """A pruning setting or input that cannot be honoured; the message says what would work."""


def unknown(kind: str, word: str, known: Iterable[str]) -> PruningError:
    """Return the error for an unknown name, with the nearest valid ones, or all of them."""
    return PruningError(registry.unknown(kind, word, known))
