"""Plain top-k: the k highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.selection.max_min import check_counts
from llava.pruning.selection.picks import Picks


def top_k(scores: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """The k highest scores of every row, ties to the lowest index.

    Args:
        scores: [B, N] floating point.
        k: one count, or LongTensor [B].
        valid: BoolTensor [B, N]; False is never picked.

    Returns Picks: indices LongTensor [B, max k] in descending order of score, padded with -1, and
    margins [B, max k]: distance to the best score passed over at that pick (the next one).
    Raises PruningError for NaN and for k above the number of valid tokens.
    """
    if scores.isnan().any() if valid is None else scores.isnan().logical_and(valid).any():
        raise PruningError("scores hold NaN; there is no highest one")
    counts = check_counts(k, scores, valid)
    ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    # Stable, so equal scores stay in index order; top-k alone leaves the order of ties open.
    ranked, order = ranked.sort(dim=1, descending=True, stable=True)
    width = max(counts, default=0)
    following = torch.nn.functional.pad(ranked, (0, 1), value=-torch.inf)[:, 1 : width + 1]
    slots = torch.arange(width, device=scores.device)
    filled = slots < torch.tensor(counts, device=scores.device)[:, None]
    margins = (ranked[:, :width] - following).masked_fill(~filled, torch.inf)
    return Picks(order[:, :width].masked_fill(~filled, -1), margins)
