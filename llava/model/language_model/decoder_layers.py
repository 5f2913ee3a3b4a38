"""The layers of transformers' Llama, Mistral, Qwen2 and Qwen3, for pruning between them.

Their layers compute alike: a norm, projections, in Qwen3 a norm of every head, rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaModel,
    MistralModel,
    Qwen2Model,
    Qwen3Model,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from llava.pruning.decoder.layers import Rotary
from llava.pruning.errors import PruningError

SUPPORTED = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class _Seen(NamedTuple):
    """Stands for a cache of a known length where masks are made."""

    length: int

    def get_query_offset(self, layer: int) -> int:
        return self.length

    def get_mask_sizes(self, queries: int, layer: int) -> tuple[int, int]:
        return self.length + queries, 0


class TransformersDecoder:
    """`llava.pruning.decoder.layers.DecoderLayers` of a language model without its output layer.

    Args:
        module: one of SUPPORTED, or of a subclass.

    Raises:
        PruningError: it is another one.
    """

    def __init__(self, module: Any) -> None:
        if not isinstance(module, SUPPORTED):
            names = ", ".join(cls.__name__ for cls in SUPPORTED)
            raise PruningError(
                f"tokens cannot be dropped between the layers of {type(module).__name__}, only of "
                f"{names}; leave the decoder method out and prune before the language model"
            )
        self.module: Any = module

    @cached_property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(self.module.layers[: self.module.config.num_hidden_layers])

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        made: Rotary = self.module.rotary_emb(hidden, position_ids=positions)
        return made

    def queries(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        return self._projected(layer, "q", hidden, rotary)

    def keys(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        keys = self._projected(layer, "k", hidden, rotary)
        repeated: Tensor = repeat_kv(keys, self.module.layers[layer].self_attn.num_key_value_groups)
        return repeated

    def _projected(self, layer: int, which: str, hidden: Tensor, rotary: Rotary) -> Tensor:
        own = self.module.layers[layer]
        attention, normed = own.self_attn, own.input_layernorm(hidden)
        heads = getattr(attention, f"{which}_proj")(normed).unflatten(2, (-1, attention.head_dim))
        norm = getattr(attention, f"{which}_norm", None)
        heads = (heads if norm is None else norm(heads)).transpose(1, 2)
        rotary = rotary[0].to(heads.device), rotary[1].to(heads.device)  # layers on other devices
        rotated: Tensor = apply_rotary_pos_emb(heads, heads, *rotary)[0]
        return rotated

    def scaling(self, layer: int) -> float:
        scaling: float = self.module.layers[layer].self_attn.scaling
        return scaling

    def attention_mask(self, hidden: Tensor, mask: Tensor | None, seen: int) -> Any:
        cache: Any = _Seen(seen)
        return create_causal_mask(self.module.config, hidden, mask, cache)

    def check(self, cache: Any) -> None:
        config = self.module.config
        kinds = {*(getattr(config, "layer_types", None) or ("full_attention",))}
        if kinds != {"full_attention"} or (
            isinstance(self.module, MistralModel) and config.sliding_window is not None
        ):
            raise PruningError(
                "tokens cannot be dropped between layers whose attention has a sliding window "
                f"({type(self.module).__name__}, sliding_window={config.sliding_window}); leave "
                "the decoder method out, or set sliding_window to null if prompts are shorter"
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            raise PruningError(
                f"layers that differ in length need a DynamicCache, not {type(cache).__name__}; "
                "leave cache_implementation and past_key_values out"
            )
