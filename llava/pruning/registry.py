"""Find method classes by name: built-in files by themselves, others through entry points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from llava.pruning.errors import PruningError
from llava.registry import Registry, unknown

if TYPE_CHECKING:
    from llava.pruning.method import PruningMethod

Method = TypeVar("Method", bound="type[PruningMethod]")


class _Methods(Registry["PruningMethod"]):
    def register(self, cls: Method) -> Method:
        """Decorate a `PruningMethod` subclass: make it known under its `name`.

        A class that is not a dataclass yet becomes a frozen one, so that its options are fields.

        Raises:
            PruningError: the class has no name, or the name belongs to another class.
        """
        if "__dataclass_params__" not in vars(cls):
            dataclass(frozen=True)(cls)
        super().register(cls)
        return cls


METHODS = _Methods(
    "pruning method", "llava.pruning.methods", group="llava.pruners", error=PruningError
)
register, get_method = METHODS.register, METHODS.get


def make_method(name: str, options: Mapping[str, Any]) -> PruningMethod:
    """Make the method `name` with `options`.

    Raises:
        PruningError: the method does not have an option, or does not take its value.
    """
    cls = get_method(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options:
        if option not in known:
            raise PruningError(unknown(f"option of {name!r}:", option, known))
    return cls(**options)


def list_methods() -> list[str]:
    """Return the registered names in alphabetical order, control methods last."""
    methods = METHODS.entries()
    return sorted(methods, key=lambda name: (methods[name].control, name))
