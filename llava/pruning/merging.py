"""Methods that make new tokens: what they make, and where it stands in the sequence."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava.pruning.budget import tile_counts
from llava.pruning.config import PruningConfig
from llava.pruning.layout import NEWLINE
from llava.pruning.selection.rows import Merged, no_choice
from llava.pruning.tokens import TokenSequence, VisualTokens, raster_slots, refuse_non_finite
from llava.pruning.trace import PruningTrace


def merge(visual: VisualTokens, config: PruningConfig, budgets: list[int | None]) -> VisualTokens:
    """Replace the tokens of every tile that has a choice by new ones; newlines go.

    An image without a budget keeps its tokens and newlines; they are their own single source.
    """
    counts = tile_counts(visual, budgets)
    sizes = visual.tile_sizes()
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    some = visual.subset(work)
    refuse_non_finite(some)
    start = time.perf_counter()
    with torch.no_grad():
        adapted = config.pruner.adapt(some, [counts[t] for t in work])
    for tile, count in zip(work, adapted, strict=True):
        counts[tile] = count
    device, slots = visual.projected.device, max(counts)
    merged = _made(some, config, adapted)
    seconds = time.perf_counter() - start
    whole = torch.tensor([k == n for k, n in zip(counts, sizes, strict=True)], device=device)
    valid = torch.ones(visual.projected.shape[:2], dtype=torch.bool, device=device)
    kept = raster_slots((valid if visual.valid is None else visual.valid) & whole[:, None])
    kept = nn.functional.pad(kept, (0, slots - kept.shape[1]), value=-1)
    sources = kept[..., None] == torch.arange(visual.projected.shape[1], device=device)
    rows = kept.clamp(min=0)[..., None].expand(-1, -1, visual.projected.shape[-1])
    projected = visual.projected.gather(1, rows).masked_fill((kept < 0)[..., None], 0)
    at = torch.tensor(work, dtype=torch.long, device=device)
    width = merged.projected.shape[1]
    fill = (0, 0, 0, slots - width)
    projected = projected.index_copy(0, at, nn.functional.pad(merged.projected, fill))
    sources[at, :width] = merged.sources
    filled = torch.arange(slots)[None] < torch.tensor(counts)[:, None]
    places = None
    if merged.places is not None:
        places = kept.index_copy(0, at, nn.functional.pad(merged.places, (0, slots - width)))
    sequences = _merged_sequences(visual, budgets, counts, slots, places)
    trace = PruningTrace(
        method=config.pruner.label(visual),
        kept=None,
        margins=no_choice(len(counts), slots, device),
        tokens_before=[sequence.total for sequence in sequences],
        tokens_after=[len(sequence.source) for sequence in sequences],
        score_seconds=0.0,
        select_seconds=seconds,
    )
    return replace(
        visual,
        projected=projected,
        valid=filled.to(device),
        sources=sources,
        sequences=sequences,
        trace=trace,
    )


def _made(visual: VisualTokens, config: PruningConfig, counts: list[int]) -> Merged:
    """What the method makes of the tiles of `visual`; nothing of no tiles."""
    if not counts:  # a budget of all patches only drops newlines
        tokens, patches = visual.projected[:, :0], visual.projected.shape[1]
        return Merged(tokens, tokens.new_zeros(0, 0, patches, dtype=torch.bool))
    return config.pruner.merge(visual, torch.tensor(counts))


def _merged_sequences(
    visual: VisualTokens,
    budgets: list[int | None],
    counts: list[int],
    slots: int,
    places: Tensor | None,
) -> tuple[TokenSequence, ...]:
    """Merged tokens, base view first, crops by `places`; images kept whole as they were."""
    count = visual.projected.shape[1]
    sequences = []
    for image, budget in enumerate(budgets):
        old = visual.sequence(image)
        if budget is None:
            # Invalid tokens hold no slot, so a token's slot is its rank among the valid ones.
            ranks = torch.arange(count, device=old.source.device).expand(
                len(visual.tiles_of(image)), -1
            )
            if visual.valid is not None:
                ranks = visual.valid[visual.tiles_of(image)].cumsum(dim=1) - 1
            flat = old.source.clamp(min=0)
            source = flat // count * slots + ranks.flatten()[flat]
            source = source.masked_fill(old.source == NEWLINE, NEWLINE)
            sequences.append(TokenSequence(source, old.place, old.total))
            continue
        own = [counts[t] for t in visual.tiles_of(image)]
        source = torch.cat([torch.arange(k) + tile * slots for tile, k in enumerate(own)])
        source = source.to(old.source.device)
        if places is not None:
            place = places[visual.tiles_of(image)].flatten()[source]
            source = source[_reading_order(place, source // slots, old.source, count)]
        sequences.append(TokenSequence(source, None, old.total))
    return tuple(sequences)


def _reading_order(place: Tensor, tile: Tensor, sequence: Tensor, count: int) -> Tensor:
    """LongTensor [n]: the order of an image's merged tokens; see `Merged.places`.

    Args:
        place: LongTensor [n], patch of its tile or below zero.
        tile: LongTensor [n], ascending.
        sequence: LongTensor, the unpruned sequence.
        count: patches of a tile.
    """
    rank = torch.zeros(int(tile.max() + 1) * count, dtype=torch.long, device=place.device)
    patches = (sequence >= 0) & (sequence < len(rank))
    rank[sequence[patches]] = patches.nonzero().flatten()
    key = torch.where(place >= 0, rank[tile * count + place.clamp(min=0)], len(sequence) * -place)
    # The base view stays as it is, before everything else; the sort is stable.
    return key.masked_fill(tile == 0, -1).argsort(stable=True)
