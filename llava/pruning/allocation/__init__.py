"""How many tokens every image keeps, and among which tokens a method selects them.

The settings and the model's tile protocol choose a strategy here, and nowhere else. LLaVA-1.5 has
one tile an image and is served by `PerTile`; all others are about the tiles of LLaVA-1.6.
"""

from __future__ import annotations

from llava.pruning.allocation.newlines import KeepNewlines
from llava.pruning.allocation.strategy import Allocation, MethodRun, PerTile, WholeImage
from llava.pruning.allocation.tile_protocols import BUDGET_RULES, ZooRelease
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


def allocation_for(run: MethodRun) -> Allocation:
    """Choose how the budgets of a batch are spent.

    Raises:
        PruningError: settings that the tile protocol does not have.
    """
    if run.visual.tile_protocol == "zoo-release":
        return ZooRelease(run)
    allocation: Allocation = WholeImage(run) if run.config.allocation == "global" else PerTile(run)
    return KeepNewlines(run, allocation) if run.config.newline == "keep" else allocation
