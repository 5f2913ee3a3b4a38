"""Hooks that a copy of their module does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook of a module: in a copy of the module, or a pickled one, it does nothing.

    Args:
        function: what it calls.
        reads_only: whether the function changes neither inputs nor outputs, see
            `llava.pruning.importance.structure.reads_only`.
    """

    def __init__(self, function: Callable[..., Any], *, reads_only: bool = False) -> None:
        self._function = function
        if reads_only:
            self.reads_only = True

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return do_nothing

    def __reduce__(self) -> Any:
        return _nothing, ()


def do_nothing(*args: Any) -> None:
    """Stand where a hook was, in a copy of its module."""


do_nothing.reads_only = True  # type: ignore[attr-defined]


def _nothing() -> Callable[..., None]:
    return do_nothing
