"""Settings of `generate`, as given or from its configs, and those that pruning cannot have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llava.pruning.errors import PruningError

# Settings whose first step reads more than the prompt.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def assisted(model: Any, call: Mapping[str, Any]) -> list[str]:
    """Return the settings of a call that ask for assisted decoding, which reads ids alone."""
    configs = (call.get("generation_config"), model.generation_config)
    return [
        name
        for name in _ASSISTED
        if call.get(name) or any(getattr(config, name, None) for config in configs)
    ]


def inferred_mask(model: Any, call: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Return the mask [B, L] that `generate` infers where the caller gives none; None for none.

    As transformers does: padding is what has the padding token, unless that also ends answers.
    """
    padding, ends = (_setting(model, call, f"{name}_token_id") for name in ("pad", "eos"))
    if call.get("attention_mask") is not None or padding is None:
        return None
    ends = ends if isinstance(ends, list | tuple) else [ends]
    mask = ids != int(padding)
    return None if int(padding) in ends or bool(mask.all()) else mask.long()


def check_settings(model: Any, call: Mapping[str, Any], ids: Tensor) -> None:
    """Refuse settings that pruned prompts cannot have.

    Raises:
        PruningError: names them.
    """
    size, longest = _setting(model, call, "prefill_chunk_size"), _setting(model, call, "max_length")
    if size:
        raise PruningError(
            f"prefill_chunk_size={size} cannot split a pruned prompt; leave it out, the prompt is "
            "shorter than the unpruned one"
        )
    if longest and _setting(model, call, "max_new_tokens") is None and longest <= ids.shape[1]:
        raise PruningError(
            f"max_length={longest} leaves no room for an answer to a prompt of {ids.shape[1]} "
            "tokens; raise it, or set max_new_tokens"
        )


def check_settings_between_layers(model: Any, call: Mapping[str, Any]) -> None:
    """Refuse settings under which tokens cannot be dropped between layers.

    Raises:
        PruningError: names them.
    """
    if _setting(model, call, "use_cache") is False:
        raise PruningError(
            "pruning between layers needs the key cache: without it every new token would read "
            "the whole prompt, and prune it differently; leave use_cache=False out"
        )
    if asked := assisted(model, call):
        raise PruningError(
            f"pruning between layers reads the prompt alone, but assisted decoding "
            f"({', '.join(asked)}) reads its candidates with it; leave {asked[0]} out, or prune "
            "before the language model"
        )
    if size := _setting(model, call, "prefill_chunk_size"):
        raise PruningError(
            f"prefill_chunk_size={size} cannot split a prompt that is pruned between layers; leave "
            "it out"
        )


def _setting(model: Any, call: Mapping[str, Any], name: str) -> Any:
    """Return a setting as given, else from the first config that has it."""
    configs = (call.get("generation_config"), model.generation_config)
    values = (call.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)
