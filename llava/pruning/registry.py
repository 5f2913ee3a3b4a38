"""Name -> method class. Built-in files are found by themselves; others through entry points."""

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from llava.pruning.errors import PruningError, unknown
from llava.utils import once

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod

ENTRY_POINT_GROUP = "llava.pruners"

Method = TypeVar("Method", bound="type[PruningMethod]")

_methods: "dict[str, type[PruningMethod]]" = {}


def register(cls: Method) -> Method:
    """Decorate a `PruningMethod` subclass: make it known under its `name`.

    A class that is not a dataclass yet becomes a frozen one, so that its options are fields.

    Raises:
        PruningError: the class has no name, or the name belongs to another class.
    """
    name = getattr(cls, "name", "")
    if not name:
        raise PruningError(f"{cls.__name__} needs a class attribute `name` to be registered")
    taken = _methods.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise PruningError(f"pruning method {name!r} is already {taken.__module__}")
    if "__dataclass_params__" not in vars(cls):
        dataclass(frozen=True)(cls)
    _methods[name] = cls
    return cls


def get_method(name: str) -> "type[PruningMethod]":
    """The class registered as `name`; PruningError naming the nearest names otherwise."""
    _load()
    if not isinstance(name, str) or name not in _methods:
        raise unknown("pruning method", name, _methods)
    return _methods[name]


def make_method(name: str, options: Mapping[str, Any]) -> "PruningMethod":
    """The method `name` with `options`; PruningError for one it does not have or take."""
    cls = get_method(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options:
        if option not in known:
            raise unknown(f"option of {name!r}:", option, known)
    return cls(**options)


def list_methods() -> list[str]:
    """Registered names in alphabetical order, control methods last."""
    _load()
    return sorted(_methods, key=lambda name: (_methods[name].control, name))


@once
def _load() -> None:
    """Import the built-in method files and the installed plug-ins."""
    package = importlib.import_module("llava.pruning.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        _load_plugin(point.name, point.load)


def _load_plugin(name: str, load: "Callable[[], type[PruningMethod]]") -> None:
    # A broken plug-in must not take the built-in methods down with it.
    try:
        register(load())
    except Exception as error:
        warnings.warn(f"pruning plug-in {name!r} is not available: {error}", stacklevel=2)
