"""Budgets of LLaVA-1.6 counted tile by tile, as programs released without unpadding count them.

`mm_next_protocol="spatial"` and `"spatial-filled"`. Every tile of an image, base view or crop,
keeps equally many of its N tokens. What they are a share of, the programs disagree about:

- FasterVLM, MMTok and VisionZip are told a number for a tile, and tables multiply it by 5. So each
  tile keeps a fifth of the budget: an image of three tiles keeps three fifths. That is the rule for
  all other methods too, so that they compare with these.
- HiPrune and SCOPE are told the number for all (`shares_budget`): each tile keeps floor(budget /
  tiles). They count the tiles of a whole batch; here every image has its own budget.

A share, `keep_ratio`, is one of 5 N, whatever tiles an image has.
"""

from __future__ import annotations

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.released import NOMINAL_TILES, nominal_budget
from llava.pruning.tokens import VisualTokens


def has_crops(visual: VisualTokens, image: int) -> bool:
    """Whether an image has tiles beside its base view."""
    return visual.layouts is not None and visual.layouts[image].crops != (0, 0)


def tile_budget(visual: VisualTokens, config: PruningConfig, image: int) -> int:
    """Tokens that `image` keeps; PruningError where a tile would keep none."""
    tiles, patches = len(visual.tiles_of(image)), visual.projected.shape[1]
    nominal = nominal_budget(visual, config)
    parts = tiles if config.pruner.shares_budget else NOMINAL_TILES
    share = nominal // parts
    if share < 1:
        raise PruningError(
            f"mm_next_protocol 'spatial' keeps the same number of every tile: {nominal} tokens for "
            f"{parts} tiles leave none; keep at least {parts}"
        )
    return tiles * min(share, patches)
