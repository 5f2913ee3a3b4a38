"""Arithmetic of budgets: shares of tiles, and prompts that are too long for what was asked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from llava.pruning.errors import PruningError
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens

logger = logging.getLogger(__name__)

# Images that a message lists one by one.
_LISTED = 3


def tile_counts(visual: VisualTokens, budgets: list[int | None]) -> list[int]:
    """Count the patches that every tile keeps: each image's budget, shared out among its tiles."""
    counts = visual.tile_sizes()
    for image, budget in enumerate(budgets):
        if budget is not None:
            tiles = visual.tiles_of(image)
            shares = share_out(budget, [counts[tile] for tile in tiles])
            counts[tiles[0] : tiles[-1] + 1] = shares
    return counts


def share_out(budget: int, capacity: list[int]) -> list[int]:
    """Share a budget out among tiles: equal floor shares, the remainder to the first (base) tile.

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


@contextmanager
def fit_prompts(
    visual: VisualTokens | RaggedTokens, budgets: list[int | None]
) -> Iterator[list[int | None]]:
    """Give the budgets that fit the prompts' length limits; warn where they are lower than asked.

    Raises:
        PruningError: as raised inside, with the limit where a lowered budget may be the cause.
    """
    lowered, reason = lower_budgets(visual, budgets)
    try:
        yield lowered
    except PruningError as error:
        if reason is None:
            raise
        raise PruningError(
            f"{error} ({reason}; keep fewer tokens or shorten the prompt)"
        ) from error
    if reason is not None:
        logger.warning(
            "%s; visual tokens are dropped before any text is cut: keep fewer tokens or shorten "
            "the prompt to choose the number yourself",
            reason,
        )


def lower_budgets(
    visual: VisualTokens | RaggedTokens, budgets: list[int | None]
) -> tuple[list[int | None], str | None]:
    """Lower budgets so that every prompt fits its length limit, and no text is cut.

    The images of a prompt share its room equally, see `share_room`, and keep at least one token
    each. A prompt without any pruned image (None) is left alone: it is the unpruned model's.

    Returns:
        The budgets, and in words what was lowered, or None if nothing was.
    """
    budgets, lengths, lowered = list(budgets), visual.lengths(), []
    for prompt in visual.prompts:
        wanted = [budgets[image] for image in prompt.images]
        if all(budget is None for budget in wanted):
            continue
        most = [
            lengths[image] if budget is None else budget
            for image, budget in zip(prompt.images, wanted, strict=True)
        ]
        for image, share, asked in zip(
            prompt.images, share_room(prompt.room, most), most, strict=True
        ):
            if share < asked:
                budgets[image] = share
                lowered.append(
                    f"image {image} room for {share} of {asked} tokens beside {prompt.text} of text"
                )
    if not lowered:
        return budgets, None
    if len(lowered) > _LISTED:
        lowered[_LISTED:] = [f"{len(lowered) - _LISTED} more images less than was asked"]
    limit = visual.prompts[0].limit
    return budgets, f"tokenizer_model_max_length is {limit} and leaves " + ", ".join(lowered)


def share_room(room: int, wanted: list[int]) -> list[int]:
    """Share `room`: each gets what it wants, or as much as any other that does not.

    The result sums to min(room, sum(wanted)); what does not divide evenly goes to the later ones of
    those that get least of what they want.
    """
    shares = list(wanted)
    for rank, index in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        shares[index] = min(wanted[index], room // (len(wanted) - rank))
        room -= shares[index]
    return shares
