"""Name -> method class. Built-in files are found by themselves; others through entry points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from llava.pruning.errors import PruningError, unknown
from llava.registry import Registry

if TYPE_CHECKING:
    from llava.pruning.methods.base import PruningMethod

Method = TypeVar("Method", bound="type[PruningMethod]")

METHODS: Registry[PruningMethod] = Registry(
    "pruning method", "llava.pruning.methods", group="llava.pruners", error=PruningError
)


def register(cls: Method) -> Method:
    """Class decorator: make a `PruningMethod` subclass known under its `name`.

    Raises PruningError if the class has no name or the name belongs to another class.
    """
    METHODS.register(cls)
    return cls


def get_method(name: str) -> type[PruningMethod]:
    """The class registered as `name`; PruningError naming the nearest names otherwise."""
    return METHODS.get(name)


def make_method(name: str, options: Mapping[str, Any]) -> PruningMethod:
    """The method `name` with `options`; PruningError for one it does not have or take."""
    cls = get_method(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options:
        if option not in known:
            raise unknown(f"option of {name!r}:", option, known)
    return cls(**options)


def list_methods() -> list[str]:
    """Registered names in alphabetical order, control methods last."""
    methods = METHODS.entries()
    return sorted(methods, key=lambda name: (methods[name].control, name))
