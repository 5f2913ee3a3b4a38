"""Greedy decoding that recomputes everything at every step, with given sets of kept tokens."""

from typing import Any

import torch
from torch import Tensor


def kept_columns(columns: list[int], picks: list[Tensor], image: int) -> list[list[int]]:
    """Turn the picks of one image's cuts into columns of its prompt, one list a cut.

    Args:
        columns: of the image's tokens in the prompt.
        picks: of a trace, LongTensor [I, K] a cut.
        image: its number.
    """
    kept = []
    for cut in picks:
        columns = [columns[index] for index in cut[image].tolist() if index >= 0]
        kept.append(columns)
    return kept


def hidden_states(
    decoder: Any,
    embeds: Tensor,
    prompt: int,
    visual: list[int],
    cuts: dict[int, list[int]],
    compact: bool,
) -> Tensor:
    """Run all layers over [1, L, D], dropping columns of the prompt before some of them.

    Args:
        decoder: a LlamaModel or one like it.
        embeds: the prompt and what follows it.
        prompt: columns of the prompt.
        visual: those of its images.
        cuts: the visual columns that are left from a layer on.
        compact: number what is left from 0 again.
    """
    hidden, left = embeds, list(range(embeds.shape[1]))
    positions = torch.arange(embeds.shape[1])[None]
    for number, layer in enumerate(decoder.layers):
        if number in cuts:
            keep = [c for c in left if c not in visual or c in cuts[number]]
            hidden = hidden[:, [left.index(column) for column in keep]]
            left = keep
            positions = torch.arange(len(left))[None] if compact else torch.tensor([left])
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    assert prompt <= embeds.shape[1]
    return decoder.norm(hidden)


def greedy(
    model: Any, embeds: Tensor, visual: list[int], cuts: dict[int, list[int]], compact: bool, n: int
) -> tuple[list[int], list[Tensor]]:
    """Continue a prompt [1, L, D] by `n` tokens: ids, and the logits of each."""
    decoder, prompt = model.get_model(), embeds.shape[1]
    tokens, logits = [], []
    for _ in range(n):
        hidden = hidden_states(decoder, embeds, prompt, visual, cuts, compact)
        logits.append(model.lm_head(hidden[:, -1]))
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, decoder.embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
    return tokens, logits
