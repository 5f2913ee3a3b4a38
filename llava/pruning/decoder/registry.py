"""Find decoder methods by name: built-in files by themselves, others through entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.pruning.registry import METHODS, MethodRegistry

if TYPE_CHECKING:
    from llava.pruning.decoder.method import DecoderMethod

DECODER_METHODS: MethodRegistry[DecoderMethod] = MethodRegistry(
    "decoder method",
    "llava.pruning.decoder.methods",
    group="llava.decoder_pruners",
    place="prunes inside the language model: give it as decoder=, as --decoder-pruner, or make the "
    "setting with PruningConfig.of(METHOD, ...)",
)
METHODS.other, DECODER_METHODS.other = DECODER_METHODS, METHODS
register, get_decoder_method = DECODER_METHODS.register, DECODER_METHODS.get
make_decoder_method = DECODER_METHODS.make


def list_decoder_methods() -> list[str]:
    """Return the registered names in alphabetical order."""
    return sorted(DECODER_METHODS.entries())
