"""A bare language model and prompts for it, for tests of pruning between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.columns import TEXT, PlacedImage, VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.trace import DecoderTrace


def llama(
    layers: int,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int = 48,
    **settings: Any,
) -> LlamaModel:
    """A model with random weights that is the same at every call."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaModel(config).eval()
        for weight in model.parameters():  # the usual ones are so small that attention is even
            torch.nn.init.normal_(weight, std=0.3) if weight.ndim == 2 else None
    return model.requires_grad_(False)


# A prompt: counts of text and of images' tokens in turn, such as (5, 64, 7) or (9,).
Parts = tuple[int, ...]


def columns_of(prompts: Sequence[Parts], side: str = "left") -> VisualColumns:
    """Where the images of prompts stand."""
    rows, images = [], []
    for prompt in prompts:
        numbers, places = [], []
        for part, count in enumerate(prompt):
            numbers.append(torch.full((count,), len(images) if part % 2 else TEXT))
            places.append(torch.arange(count) if part % 2 else torch.zeros(count).long())
            if part % 2:
                images.append(PlacedImage(count))
        rows.append((torch.cat(numbers), torch.cat(places)))
    return VisualColumns.of_rows(rows, images, side)


def embeddings_of(prompt: Parts, seed: int = 0, hidden: int = 32) -> Tensor:
    """Random float64 embeddings [L, hidden] of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(prompt), hidden, generator=generator, dtype=torch.float64)


class Read(NamedTuple):
    """What a model made of prompts: `hidden` [B, L, D] of the last layer, `cache`, `trace`."""

    hidden: Tensor
    cache: DynamicCache
    trace: DecoderTrace | None

    @property
    def lengths(self) -> list[int]:
        """Tokens in every layer's cache."""
        return [self.cache.get_seq_length(layer) for layer in range(len(self.cache.layers))]


def read(
    model: LlamaModel,
    config: DecoderConfig | None,
    columns: VisualColumns,
    rows: Sequence[Tensor],
    steps: Sequence[Tensor] = (),
    generating: bool = True,
) -> tuple[Read, list[Tensor]]:
    """Read prompts, given as embeddings [L, D] each, and tokens [B, D] that follow one by one.

    Returns:
        What was read of the prompts, and the last hidden states [B, D] of every step.
    """
    embeds = rows[0].new_zeros(len(rows), columns.width, rows[0].shape[1])
    for row, mask, own in zip(embeds, columns.mask, rows, strict=True):
        row[mask] = own
    embeds, cache, traces = embeds.to(model.dtype), DynamicCache(), []
    mask = columns.mask.long()
    padded = not bool(columns.mask.all())
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    states = []
    layers = TransformersDecoder(model)
    with (
        torch.no_grad(),
        decoding(layers, config, columns, generating=generating, done=traces.append),
    ):
        hidden = model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        read = Read(hidden, cache, traces[0] if traces else None)
        lengths = read.lengths
        for step, token in enumerate(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                inputs_embeds=token[:, None].to(model.dtype),
                attention_mask=mask if padded else None,
                position_ids=positions[:, -1:] + 1 + step,
                past_key_values=cache,
                use_cache=True,
            )
            states.append(output.last_hidden_state[:, 0])
        assert [length + len(steps) for length in lengths] == read.lengths
    return read, states
