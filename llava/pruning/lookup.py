"""Find what prunes a model: the model itself, or the family that its class belongs to.

Families are classes of `llava.families` and of installed plug-ins (entry points `llava.families`).
They are known here by what they must have, so that pruning depends on no model.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from llava.pruning.errors import PruningError
from llava.registry import Registry


class ModelFamily(Protocol):
    """What is asked of a family here; `llava.families.Family` is its base class.

    Attributes:
        name: what it is registered as.
        classes: names of the model classes it prunes.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]

    @classmethod
    def attachment(cls, model: Any) -> Any:
        """Return the `Prunable` of a model of this family, the same at every call."""


class Families(Registry[ModelFamily]):
    """Families by their names; no two prune the same class."""

    def register(self, cls: type[ModelFamily]) -> type[ModelFamily]:
        """Make a family known by its name and its classes. Usable as a decorator.

        Raises:
            PruningError: it has no name, or another family has its name or one of its classes.
        """
        for name, other in self._entries.items():
            taken = [own for own in cls.classes if own in other.classes]
            if taken and name != cls.name:
                raise PruningError(
                    f"model family {cls.name!r} prunes {taken[0]}, which family {name!r} of "
                    f"{other.__module__} does already; leave it out of {cls.__name__}.classes"
                )
        return super().register(cls)


FAMILIES = Families("model family", "llava.families", group="llava.families", error=PruningError)


def family_of(model: Any) -> type[ModelFamily] | None:
    """Return the family that prunes a model, by the names of its classes; None if none does."""
    families = FAMILIES.entries().values()
    for cls in type(model).__mro__:
        for family in families:
            if cls.__name__ in family.classes:
                return family
    return None


def unwrapped(model: Any) -> Any:
    """Return the model inside wrappers: PEFT's, a compiled module, data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if inner is None or inner is model:
            return model
        model = inner


def known_classes() -> list[str]:
    """Return the names of all model classes that a family prunes."""
    return [name for family in FAMILIES.entries().values() for name in family.classes]
