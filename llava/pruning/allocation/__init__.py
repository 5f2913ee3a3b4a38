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
from llava.pruning.errors import PruningError
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import VisualTokens


def image_budgets(visual: VisualTokens | RaggedTokens, config: PruningConfig) -> list[int | None]:
    """Count the tokens that every image should keep; None for an image that stays as it is.

    Raises:
        PruningError: a budget that cannot be counted so.
    """
    sizes, lengths = visual.tile_sizes(), visual.lengths()
    rule = BUDGET_RULES.get(visual.tile_protocol) if config.pruner.budgeted else None
    if rule is not None and config.scope != "image":
        raise PruningError(
            f"mm_next_protocol {visual.tile_protocol!r} counts the tokens of every image, so scope "
            "can only be 'image'"
        )
    patches = [sum(sizes[t] for t in visual.tiles_of(image)) for image in range(len(lengths))]
    budgets: list[int | None] = [None] * len(lengths)
    for share in visual.shares or [[image] for image in range(len(lengths))]:
        own = [lengths[image] for image in share], [patches[image] for image in share]
        for image, kept in zip(share, config.num_kept_of_prompt(*own), strict=True):
            counted = None
            if rule is not None and isinstance(visual, VisualTokens):
                counted = rule(visual, config, image)
            kept, extra = counted or (kept, 0)
            budgets[image] = None if kept >= lengths[image] else kept + extra
    return budgets


def choose_strategy(visual: VisualTokens | RaggedTokens, config: PruningConfig) -> Strategy:
    """Choose how the budgets of a batch are spent.

    Raises:
        PruningError: settings that the tile protocol does not have.
    """
    if visual.tile_protocol == "zoo-release":
        check_zoo_release(config)
        return select_as_zoo_release
    strategy = select_in_images if config.allocation == "global" else select_in_tiles
    return partial(keep_newlines, strategy) if config.newline == "keep" else strategy
