"""How many tokens every image, and every tile of it, keeps."""

from __future__ import annotations

from llava.pruning.config import PruningConfig
from llava.pruning.released import applies_to, extra_places, nominal_budget
from llava.pruning.tokens import VisualTokens


def image_budgets(visual: VisualTokens, config: PruningConfig) -> list[int | None]:
    """Tokens every image keeps; None for an image that stays as it is.

    A prompt that would be too long for the model keeps fewer, so that none of its text is lost. One
    without any pruned image is left alone: it is the unpruned model's.
    """
    sizes = visual.tile_sizes()
    totals = [visual.sequence(image).total for image in range(visual.num_images)]
    budgets: list[int | None] = []
    for image, total in enumerate(totals):
        if visual.released and config.pruner.budgeted and applies_to(visual, image):
            kept, extra = nominal_budget(visual, config), len(extra_places(visual, image))
        else:
            kept, extra = config.num_kept(total, sum(sizes[t] for t in visual.tiles_of(image))), 0
        budgets.append(None if kept >= total else kept + extra)
    for prompt in visual.prompts:
        wanted = [budgets[image] for image in prompt.images]
        if any(budget is not None for budget in wanted):
            most = [
                totals[i] if k is None else k for i, k in zip(prompt.images, wanted, strict=True)
            ]
            for image, k, m in zip(
                prompt.images, level(max(prompt.room, 0), most), most, strict=True
            ):
                budgets[image] = budgets[image] if k == m else k
    return budgets


def level(room: int, most: list[int]) -> list[int]:
    """What each of several may have of `room`: all it wants, or as much as any other that does not.

    The result sums to min(room, sum(most)); what does not divide evenly goes to the later ones of
    those that get least of what they want.
    """
    shares = list(most)
    for rank, index in enumerate(sorted(range(len(most)), key=most.__getitem__)):
        shares[index] = min(most[index], room // (len(most) - rank))
        room -= shares[index]
    return shares


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
