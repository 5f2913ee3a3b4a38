"""Find classes by name: methods, benchmarks and whatever else is chosen by name."""

import difflib
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from llava.utils import UserInputError, once

T = TypeVar("T")


def unknown(kind: str, word: Any, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """Say that a name is unknown, with the nearest valid ones, or all of them.

    Args:
        kind: what the name should be, such as `pruning method`.
        word: what was given.
        known: valid names.
        also: names of something else that may have been meant.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(word), sorted({*names, *also}), n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(name) for name in near) + "?"
    else:
        hint = "valid: " + (", ".join(names) if names else "none")
    return f"unknown {kind} {word!r}; {hint}"


class Registry(Generic[T]):
    """Classes by their `name` attribute, found in a package and in installed plug-ins.

    Args:
        kind: what one entry is called in messages, such as `pruning method`.
        package: dotted name of the package whose modules register the built-in entries; imported
            when a name is first looked up.
        group: entry-point group of third-party entries, or None.
        error: exception of unknown names and of names that are taken.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        *,
        group: str | None = None,
        error: type[UserInputError] = UserInputError,
    ) -> None:
        self.kind, self.package, self.group, self.error = kind, package, group, error
        self._entries: dict[str, type[T]] = {}
        self._load = once(self._import_all)

    def register(self, cls: type[T]) -> type[T]:
        """Make a class known by its `name`. Usable as a decorator.

        A module that is imported again may register its classes again.

        Raises:
            UserInputError: (`error`) no name, or one that belongs to another class.
        """
        name = getattr(cls, "name", "")
        if not name:
            raise self.error(f"{cls.__name__} needs a class attribute `name` to be registered")
        taken = self._entries.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise self.error(f"{self.kind} {name!r} is already {taken.__module__}")
        self._entries[name] = cls
        return cls

    def get(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raises:
            UserInputError: (`error`) an unknown name; the message has the nearest ones.
        """
        entries = self.entries()
        if not isinstance(name, str) or name not in entries:
            raise self.error(unknown(self.kind, name, entries))
        return entries[name]

    def entries(self) -> Mapping[str, type[T]]:
        """Return every class by its name, read-only."""
        self._load()
        return MappingProxyType(self._entries)

    def _import_all(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        if self.group is not None:
            for point in entry_points(group=self.group):
                self._load_plugin(point.name, point.load)

    def _load_plugin(self, name: str, load: Callable[[], type[T]]) -> None:
        # A broken plug-in must not take the built-in entries down with it.
        try:
            self.register(load())
        except Exception as error:
            warnings.warn(f"{self.kind} plug-in {name!r} is not available: {error}", stacklevel=2)
