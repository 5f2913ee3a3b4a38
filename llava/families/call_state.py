"""The calls of pruned models that a caller is inside of, innermost last, in a context variable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_NO_CACHE = object()


@dataclass(eq=False)
class CallState:
    """A call of `forward` or `generate`.

    Attributes:
        target: what stands for the model (`Attachment`).
        language_model: of the model.
        features: what is handed to it (`DeepFeatures`), or None.
        generating: whether the call is `generate`, which calls `forward` itself.
        outer: the call around this one.
        pruned: what was made of the call (`PrunedCall`), or None.
        undo: what ends with the call of `forward`.
    """

    target: Any
    language_model: nn.Module
    features: Any
    generating: bool
    outer: CallState | None
    pruned: Any = None
    undo: ExitStack = field(default_factory=ExitStack)
    _cache: Any = None

    def makes(self, arguments: Any) -> bool:
        """Return whether `generate` itself makes this call of `forward`, and no code inside it.

        Its calls share one cache, or say that they use none.
        """
        cache = arguments.get("past_key_values")
        if cache is None and arguments.get("use_cache") is False:
            cache = _NO_CACHE
        if self._cache is None:
            self._cache = cache
        return cache is not None and cache is self._cache


_innermost: ContextVar[CallState | None] = ContextVar("pruned call", default=None)


def current_call() -> CallState | None:
    """Return the innermost call that the caller is inside of."""
    return _innermost.get()


def enter_call(
    target: Any, language_model: nn.Module, features: Any, pruned: Any, undo: ExitStack
) -> None:
    """Begin a call of `forward`; `leave_call` ends it and closes `undo`."""
    outer = _innermost.get()
    _innermost.set(CallState(target, language_model, features, False, outer, pruned, undo))


def leave_call(target: Any) -> tuple[bool, Any]:
    """End the call of `forward` that the caller is in.

    Returns:
        Whether it is in one, and its `pruned`.
    """
    call = _innermost.get()
    if call is None or call.generating or call.target is not target:
        return False, None
    _innermost.set(call.outer)
    call.undo.close()
    return True, call.pruned


@contextmanager
def inside_generate(target: Any, language_model: nn.Module, features: Any) -> Iterator[None]:
    """Be inside `generate`: its calls of `forward` stay as it makes them, but for `features`."""
    token = _innermost.set(CallState(target, language_model, features, True, _innermost.get()))
    try:
        yield
    finally:
        _innermost.reset(token)
