"""Find method classes by name: built-in files by themselves, others through entry points.

`MethodRegistry` is also what `llava.pruning.decoder.registry` finds decoder methods with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llava.pruning.errors import PruningError
from llava.registry import Registry, unknown

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


class MethodRegistry(Registry[T]):
    """Classes of methods, whose fields are options.

    Args:
        kind, package, group: see `Registry`.
        place: what its methods do and how they are given, for users who name one elsewhere.

    Attributes:
        other: the registry of methods that prune elsewhere, for error messages.
    """

    def __init__(self, kind: str, package: str, *, group: str, place: str) -> None:
        super().__init__(kind, package, group=group, error=PruningError)
        self.place = place
        self.other: MethodRegistry[Any] | None = None

    def register(self, cls: Class) -> Class:
        """Decorate a class of methods: make it known under its `name`.

        A class that is not a dataclass yet becomes a frozen one, so that its options are fields.

        Raises:
            PruningError: the class has no name, or the name belongs to another class.
        """
        if "__dataclass_params__" not in vars(cls):
            dataclass(frozen=True)(cls)
        super().register(cast(type[T], cls))
        return cls

    def get(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raises:
            PruningError: there is none; the message has the nearest names of both registries, or
                how a method of the other one is given.
        """
        entries = self.entries()
        if isinstance(name, str) and name in entries:
            return entries[name]
        others: Mapping[str, Any] = {}
        if self.other is not None:
            others = self.other.entries()
            if isinstance(name, str) and name in others:
                raise PruningError(f"{name!r} {self.other.place}")
        raise PruningError(unknown(self.kind, name, entries, others))

    def make(self, name: str, options: Mapping[str, Any]) -> T:
        """Make the method `name` with `options`.

        Raises:
            PruningError: there is no such method, it does not have an option, or does not take its
                value.
        """
        cls: Any = self.get(name)
        known = [field.name for field in fields(cls) if field.init]
        for option in options:
            if option not in known:
                raise PruningError(unknown(f"option of {name!r}:", option, known))
        made: T = cls(**options)
        return made


METHODS: MethodRegistry[PruningMethod] = MethodRegistry(
    "pruning method",
    "llava.pruning.methods",
    group="llava.pruners",
    place="prunes before the language model, not between its layers: give it as method, --pruner, "
    "or in front of the + of an arm such as zoo@192+fastv@64",
)
register, get_method, make_method = METHODS.register, METHODS.get, METHODS.make


def list_methods() -> list[str]:
    """Return the registered names in alphabetical order, control methods last."""
    methods = METHODS.entries()
    return sorted(methods, key=lambda name: (methods[name].control, name))
