"""How many tokens every image keeps, and among which tokens a method selects them.

The settings and the model's tile protocol choose a strategy here, and nowhere else. LLaVA-1.5 has
one tile an image and is served by `select_in_tiles`; all others are about the tiles of LLaVA-1.6.
"""

from functools import partial

from llava.pruning.allocation.newlines import keep_newlines
from llava.pruning.allocation.strategy import Strategy, select_in_images, select_in_tiles
from llava.pruning.allocation.tile_protocols import (
    BUDGET_RULES,
    check_zoo_release,
    select_as_zoo_release,
)
from llava.pruning.config import PruningConfig
from llava.pruning.tokens import VisualTokens


def image_budgets(visual: VisualTokens, config: PruningConfig) -> list[int | None]:
    """Count the tokens that every image should keep; None for an image that stays as it is."""
    sizes = visual.tile_sizes()
    rule = BUDGET_RULES.get(visual.tile_protocol) if config.pruner.budgeted else None
    budgets: list[int | None] = []
    for image, total in enumerate(visual.lengths()):
        counted = None if rule is None else rule(visual, config, image)
        if counted is None:
            patches = sum(sizes[tile] for tile in visual.tiles_of(image))
            counted = config.num_kept(total, patches), 0
        kept, extra = counted
        budgets.append(None if kept >= total else kept + extra)
    return budgets


def choose_strategy(visual: VisualTokens, config: PruningConfig) -> Strategy:
    """Choose how the budgets of a batch are spent.

    Raises:
        PruningError: settings that the tile protocol does not have.
    """
    if visual.tile_protocol == "zoo-release":
        check_zoo_release(config)
        return select_as_zoo_release
    strategy = select_in_images if config.allocation == "global" else select_in_tiles
    return partial(keep_newlines, strategy) if config.newline == "keep" else strategy
