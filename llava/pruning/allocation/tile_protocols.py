"""Budgets of LLaVA-1.6 counted as released programs count them (`mm_next_protocol`).

"spatial" and "spatial-filled": every tile of an image, base view or crop, keeps equally many of its
N tokens. What they are a share of, the programs disagree about:

- FasterVLM, MMTok and VisionZip are told a number for a tile, and tables multiply it by 5. So each
  tile keeps a fifth of the budget: an image of three tiles keeps three fifths. That is the rule for
  all other methods too, so that they compare with these.
- HiPrune and SCOPE are told the number for all (`shares_budget`): each tile keeps floor(budget /
  tiles). They count the tiles of a whole batch; here every image has its own budget.

A share, `keep_ratio`, is one of 5 N, whatever tiles an image has.

"zoo-release": the selection of the code released with ZOO-Prune for LLaVA-NeXT, for comparable
numbers. It differs from what the paper says in three ways:

- The budget is a share of 2880 = 5 x 576 whatever the image has: every tile that is not all padding
  keeps int(int(2880 * ratio) / tiles), and what a short tile cannot hold is lost.
- Newlines should be kept in addition to the budget, but their places are taken before the base view
  is put in front of them. So one patch of every row is kept instead (some in the base view, the
  others in the crops), and the newlines go. What the selection had kept anyway is not counted
  twice, so an image keeps more than its budget by a number that depends on its content.
- The sensitivity comes from a projector that was never trained. That is not repeated here.
"""

from collections.abc import Callable

from llava.pruning.allocation.budgets import tile_counts
from llava.pruning.allocation.strategy import MethodRun, Selection, select_counted
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.indices import constant
from llava.pruning.tokens import VisualTokens

# Base view and four crops: what released budgets are shares of.
NOMINAL_TILES = 5

# Tokens that an image keeps, and how many it keeps besides; None where a protocol has no rule.
Counted = tuple[int, int] | None


def check_zoo_release(config: PruningConfig) -> None:
    """Raise PruningError for settings that ZOO-Prune's released code does not have."""
    if config.pruner.merges or config.allocation != "per_tile" or config.newline != "drop":
        raise PruningError(
            "mm_next_protocol 'zoo-release' selects in every tile: it needs a method that "
            "selects, allocation='per_tile' and newline='drop'"
        )


def select_as_zoo_release(run: MethodRun, budgets: list[int | None]) -> Selection:
    """Select in every tile as ZOO-Prune's released code does, see `Strategy`.

    Raises:
        PruningError: a budget leaves no token for a tile.
    """
    visual, sizes, counts = run.visual, run.visual.tile_sizes(), tile_counts(run.visual, budgets)
    extras: dict[int, list[int]] = {}
    for image, budget in enumerate(budgets):
        extra = [] if budget is None else _extra_places(visual, image)
        if budget is None or not extra:
            continue
        extras[image], tiles = extra, visual.tiles_of(image)
        # The budget includes the extra places; a limited prompt may leave less than is nominal.
        nominal = min(_nominal_budget(visual, run.config), budget - len(extra))
        share = nominal // sum(sizes[tile] > 0 for tile in tiles)
        if share < 1:
            raise PruningError(
                f"mm_next_protocol 'zoo-release': {max(nominal, 0)} tokens leave none for a "
                f"tile of image {image}; keep more tokens"
            )
        for tile in tiles:
            counts[tile] = min(share, sizes[tile])
    selected = select_counted(run, budgets, counts)
    if not extras:
        return selected
    places = selected.places()
    for image, extra in extras.items():
        places[image].index_fill_(0, constant(tuple(extra), places[image].device), True)
    return run.keep_places(places, selected.margins)


def _count_as_zoo(visual: VisualTokens, config: PruningConfig, image: int) -> Counted:
    extra = _extra_places(visual, image)
    return (_nominal_budget(visual, config), len(extra)) if extra else None


def _count_by_tile(visual: VisualTokens, config: PruningConfig, image: int) -> Counted:
    tiles, patches = len(visual.tiles_of(image)), visual.projected.shape[1]
    if visual.layouts is None or tiles == 1:
        return None
    nominal = _nominal_budget(visual, config)
    parts = tiles if config.pruner.shares_budget else NOMINAL_TILES
    share = nominal // parts
    if share < 1:
        raise PruningError(
            f"mm_next_protocol 'spatial' keeps the same number of every tile: {nominal} tokens for "
            f"{parts} tiles leave none; keep at least {parts}"
        )
    return tiles * min(share, patches), 0


# By tile protocol: how the budget of an image is counted.
BUDGET_RULES: dict[str, Callable[[VisualTokens, PruningConfig, int], Counted]] = {
    "zoo-release": _count_as_zoo,
    "spatial": _count_by_tile,
    "spatial-filled": _count_by_tile,
}


def _nominal_budget(visual: VisualTokens, config: PruningConfig) -> int:
    """Return the budget of every image before it is divided among tiles."""
    if config.keep_ratio is not None:
        return int(NOMINAL_TILES * visual.projected.shape[1] * config.keep_ratio)
    assert config.keep_tokens is not None  # a method with a budget has one of the two
    return config.keep_tokens


def _extra_places(visual: VisualTokens, image: int) -> list[int]:
    """Return the places of the unpruned sequence that are kept instead of the newlines.

    Empty for an image without crops or newlines, which is pruned as with every other protocol.
    """
    if visual.layouts is None or visual.layouts[image].tiles == 1:
        return []
    rows, width = visual.layouts[image].newline_rows
    return [row * (width + 1) + width for row in range(rows)]
