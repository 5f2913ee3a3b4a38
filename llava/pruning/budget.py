"""How many tokens every image, and every tile of it, keeps."""

from __future__ import annotations

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.tokens import VisualTokens


def image_budgets(visual: VisualTokens, config: PruningConfig) -> list[int | None]:
    """Tokens every image keeps; None for an image that stays as it is."""
    sizes = visual.tile_sizes()
    budgets: list[int | None] = []
    for image in range(visual.num_images):
        total = visual.sequence(image).total
        patches = sum(sizes[t] for t in visual.tiles_of(image))
        kept = config.num_kept(total, patches)
        limit = visual.limits[image] if visual.limits is not None else None
        # A method that removes nothing cannot make room either.
        if limit is not None and config.pruner.budgeted:
            kept = min(kept, limit)
        budgets.append(None if kept >= total else kept)
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


def reserve_newlines(visual: VisualTokens, budgets: list[int | None]) -> list[int | None]:
    """What is left of each budget once every row of the image has its newline.

    Raises PruningError where nothing is left.
    """
    patches: list[int | None] = []
    for image, budget in enumerate(budgets):
        rows, width = visual.layouts[image].newline_rows if visual.layouts else (0, 0)
        reserved = rows if width else 0
        if budget is not None and budget <= reserved:
            raise PruningError(
                f"newline='keep' reserves {reserved} tokens of image {image} for the ends of its "
                f"rows, so {budget} tokens leave none for patches; keep at least {reserved + 1}, "
                "or use newline='drop'"
            )
        patches.append(None if budget is None else budget - reserved)
    return patches
