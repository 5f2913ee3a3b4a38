"""How many tokens every image, and every tile of it, keeps."""

from __future__ import annotations

from llava.pruning.config import PruningConfig
from llava.pruning.released import applies_to, extra_places, nominal_budget
from llava.pruning.tile_budgets import has_crops, tile_budget
from llava.pruning.tokens import VisualTokens


def image_budgets(visual: VisualTokens, config: PruningConfig) -> list[int | None]:
    """Tokens that every image should keep; None for an image that stays as it is."""
    sizes = visual.tile_sizes()
    totals = [visual.sequence(image).total for image in range(visual.num_images)]
    budgets: list[int | None] = []
    for image, total in enumerate(totals):
        if visual.released and config.pruner.budgeted and applies_to(visual, image):
            kept, extra = nominal_budget(visual, config), len(extra_places(visual, image))
        elif visual.tile_budgets and config.pruner.budgeted and has_crops(visual, image):
            kept, extra = tile_budget(visual, config, image), 0
        else:
            kept, extra = config.num_kept(total, sum(sizes[t] for t in visual.tiles_of(image))), 0
        budgets.append(None if kept >= total else kept + extra)
    return budgets


def tile_counts(
    visual: VisualTokens, budgets: list[int | None], sizes: list[int] | None = None
) -> list[int]:
    """Patches every tile keeps: each image's budget, shared out among its tiles."""
    sizes = visual.tile_sizes() if sizes is None else sizes
    counts = list(sizes)
    for image, budget in enumerate(budgets):
        if budget is None:
            continue
        tiles = visual.tiles_of(image)
        shares = share_out(budget, [sizes[t] for t in tiles])
        for tile, share in zip(tiles, shares, strict=True):
            counts[tile] = share
    return counts


def share_out(budget: int, capacity: list[int]) -> list[int]:
    """Per-tile allocation: equal floor shares, the remainder to the first (base) tile.

    What a short tile cannot hold goes to the other tiles in tile order. The result sums to
    min(budget, sum(capacity)).
    """
    if not capacity:
        return []
    floor, rest = divmod(budget, len(capacity))
    shares = [min(floor + (rest if t == 0 else 0), room) for t, room in enumerate(capacity)]
    left = min(budget, sum(capacity)) - sum(shares)
    for tile, room in enumerate(capacity):
        extra = min(left, room - shares[tile])
        shares[tile] += extra
        left -= extra
    return shares
