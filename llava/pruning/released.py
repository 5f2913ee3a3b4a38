"""The selection of the code released with ZOO-Prune for LLaVA-NeXT, for comparable numbers.

`mm_next_protocol="zoo-release"`. It differs from what the paper says in three ways:

- The budget is a share of 2880 = 5 x 576 whatever the image has: every tile that is not all padding
  keeps int(int(2880 * ratio) / tiles), and what a short tile cannot hold is lost.
- Newlines should be kept beside the budget, but their places are taken before the base view is put
  in front of them. So one patch of every row is kept in their place (some in the base view, the
  others in the crops), and the newlines go. What the selection had kept anyway is not counted
  twice, so an image keeps more than its budget by a number that depends on its content.
- The sensitivity comes from a projector that was never trained. That is not repeated here.
"""

from __future__ import annotations

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.tokens import VisualTokens

# Base view and four crops: what the released budgets are shares of.
NOMINAL_TILES = 5


def applies_to(visual: VisualTokens, image: int) -> bool:
    """Whether the released rules say anything about an image: it has crops, with newlines."""
    if visual.layouts is None:
        return False
    layout = visual.layouts[image]
    return layout.newline and layout.crops != (0, 0)


def check_released(config: PruningConfig) -> None:
    """Raise PruningError for settings that the released code does not have."""
    if config.pruner.merges or config.allocation != "per_tile" or config.newline != "drop":
        raise PruningError(
            "mm_next_protocol 'zoo-release' selects in every tile: it needs a method that selects, "
            "allocation='per_tile' and newline='drop'"
        )


def nominal_budget(visual: VisualTokens, config: PruningConfig) -> int:
    """The budget of every image before it is divided among tiles."""
    if config.keep_ratio is not None:
        return int(NOMINAL_TILES * visual.projected.shape[1] * config.keep_ratio)
    assert config.keep_tokens is not None  # a method with a budget has one of the two
    return config.keep_tokens


def released_counts(
    visual: VisualTokens, config: PruningConfig, image: int, budget: int
) -> list[int]:
    """Patches every tile of `image` keeps, before the extra ones, which `budget` includes."""
    sizes = visual.tile_sizes()
    capacity = [sizes[t] for t in visual.tiles_of(image)]
    nominal = min(nominal_budget(visual, config), budget - len(extra_places(visual, image)))
    share = nominal // sum(room > 0 for room in capacity)
    if share < 1:
        raise PruningError(
            f"mm_next_protocol 'zoo-release': {max(nominal, 0)} tokens leave none for a tile of "
            f"image {image}; keep more tokens"
        )
    return [min(share, room) for room in capacity]


def extra_places(visual: VisualTokens, image: int) -> list[int]:
    """Places of the unpruned sequence that are kept in the newlines' stead."""
    assert visual.layouts is not None
    rows, width = visual.layouts[image].newline_rows
    return [row * (width + 1) + width for row in range(rows)]
