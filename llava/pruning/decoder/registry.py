"""Find decoder methods by name: built-in files by themselves, others through entry points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from llava.pruning.errors import PruningError
from llava.pruning.registry import METHODS
from llava.registry import Registry, unknown

if TYPE_CHECKING:
    from llava.pruning.decoder.method import DecoderMethod

Method = TypeVar("Method", bound="type[DecoderMethod]")


class _Methods(Registry["DecoderMethod"]):
    def register(self, cls: Method) -> Method:
        """Decorate a `DecoderMethod` subclass: make it known under its `name`.

        Raises:
            PruningError: the class has no name, or the name belongs to another class.
        """
        if "__dataclass_params__" not in vars(cls):
            dataclass(frozen=True)(cls)
        super().register(cls)
        return cls


DECODER_METHODS = _Methods(
    "decoder method",
    "llava.pruning.decoder.methods",
    group="llava.decoder_pruners",
    error=PruningError,
)
register, get_decoder_method = DECODER_METHODS.register, DECODER_METHODS.get


def make_decoder_method(name: str, options: Mapping[str, Any]) -> DecoderMethod:
    """Make the method `name` with `options`.

    Raises:
        PruningError: there is no such method, it does not have an option, or does not take its
            value.
    """
    if name in METHODS.entries() and name not in DECODER_METHODS.entries():
        raise PruningError(
            f"{name!r} prunes before the language model, not between its layers: give it as "
            "method, --pruner, or in front of the + of an arm such as zoo@192+fastv@64"
        )
    cls = get_decoder_method(name)
    known = [field.name for field in fields(cls) if field.init]
    for option in options:
        if option not in known:
            raise PruningError(unknown(f"option of {name!r}:", option, known))
    return cls(**options)


def list_decoder_methods() -> list[str]:
    """Return the registered names in alphabetical order."""
    return sorted(DECODER_METHODS.entries())
