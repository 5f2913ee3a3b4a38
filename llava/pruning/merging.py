"""Methods that make new tokens: where these are among what is left of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.pruning.allocation.budgets import tile_counts
from llava.pruning.allocation.strategy import MethodRun
from llava.pruning.selection.rows import no_choice
from llava.pruning.tokens import PrunedTokens, TokenSequence, gather_slots, raster_slots


def merge(run: MethodRun) -> PrunedTokens:
    """Replace the tokens of every tile that has too many by new ones; newlines go.

    An image without a budget keeps its tokens and newlines; they are their own single source.
    """
    visual, counts = run.visual, tile_counts(run.visual, run.budgets)
    sizes, device = visual.tile_sizes(), visual.projected.device
    whole = [k == n for k, n in zip(counts, sizes, strict=True)]
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    if work:  # a budget of all patches only drops newlines
        asked = [counts[tile] for tile in work]
        merged = run.merge(visual.subset(work), asked)
        for tile, count in zip(work, merged.counts or asked, strict=True):
            counts[tile] = count
    width = max(counts)
    valid = visual.valid_mask()
    kept = raster_slots(valid & torch.tensor(whole, device=device)[:, None])
    kept = pad(kept, (0, width - kept.shape[1]), value=-1)
    projected, places = gather_slots(visual.projected, kept), None
    sources = kept[..., None] == torch.arange(visual.projected.shape[1], device=device)
    if work:
        at, free = torch.tensor(work, device=device), width - merged.projected.shape[1]
        projected = projected.index_copy(0, at, pad(merged.projected, (0, 0, 0, free)))
        sources[at] = pad(merged.sources, (0, 0, 0, free))
        if merged.places is not None:
            places = kept.index_copy(0, at, pad(merged.places, (0, free)))
    filled = torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
    slots = valid.cumsum(dim=1) - 1
    sequences = []
    for image, (old, budget) in enumerate(zip(run.sequences, run.budgets, strict=True)):
        tiles = visual.tiles_of(image)
        if budget is None:
            everything = torch.ones_like(old.source, dtype=torch.bool)
            sequences.append(old.keep(everything, slots[tiles], width))
            continue
        source = filled[tiles].flatten().nonzero().flatten()
        if places is not None:
            place = places[tiles].flatten()[source]
            source = source[_reading_order(place, source // width, old.source, valid.shape[1])]
        sequences.append(TokenSequence(source, None, old.total))
    margins = no_choice(len(counts), width, device)
    return run.result(projected, filled, sequences, margins, sources=sources)


def _reading_order(place: Tensor, tile: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Order the merged tokens of an image, LongTensor [n]; see `Merged.places`.

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
