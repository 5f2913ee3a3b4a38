"""Plain top-k: the k highest scores."""

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.selection.rows import Picks, Rows, check_counts


def top_k(scores: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """The k highest scores of every row, ties to the lowest index.

    Args:
        scores: [B, N] floating point.
        k: one count, or LongTensor [B].
        valid: BoolTensor [B, N]; False is never picked.

    Returns Picks: indices LongTensor [B, max k] ascending, as all are picked at once, padded with
    -1; margins [B, max k]: in a row always the lowest score picked minus the highest left out.
    Raises PruningError for NaN and for k above the number of valid tokens.
    """
    counts = check_counts(k, scores, valid)
    width = max(counts, default=0)
    total = scores.shape[1]
    if valid is None and 0 < width < total and counts.count(width) == len(counts):
        highest = scores.topk(width + 1, dim=1)[0]
        best_left = highest[:, width:]
        places = (scores > best_left).nonzero()
        # A tie at the edge leaves too few above it, and so does a NaN, which counts as highest.
        if len(places) == width * len(counts):
            margin = highest[:, width - 1 : width] - best_left
            return Picks(places[:, 1].view(-1, width), margin.expand(-1, width))
    return _top_k_of_any(scores, counts, valid)


def highest(rows: Rows) -> Picks:
    """Pick the tokens with the highest scores of every row."""
    return top_k(rows.scored, rows.counts, valid=rows.valid)


def fill_with_top_k(taken: list[int], scores: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Return `count` tokens of one row, LongTensor: `taken`, then the others of highest scores."""
    first = torch.tensor(taken, dtype=torch.long, device=scores.device)
    rest = scores.index_fill(0, first, -torch.inf)[None]
    free = None if valid is None else valid.index_fill(0, first, False)[None]
    return torch.cat([first, top_k(rest, count - len(taken), valid=free).indices[0]])


def _top_k_of_any(scores: Tensor, counts: list[int], valid: Tensor | None) -> Picks:
    """`top_k` for ties, padding and a count for every row."""
    if scores.isnan().any() if valid is None else scores.isnan().logical_and(valid).any():
        raise PruningError("scores hold NaN; there is no highest one")
    order = ranking(scores, valid)
    width = max(counts, default=0)
    slots = torch.arange(width, device=scores.device)
    filled = slots < torch.tensor(counts, device=scores.device)[:, None]
    last = torch.iinfo(order.dtype).max
    picked = order[:, :width].masked_fill(~filled, last).sort(dim=1).values
    ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    ranked = torch.nn.functional.pad(ranked.gather(1, order), (1, 1), value=-torch.inf)
    edge = torch.tensor(counts, device=scores.device)[:, None]
    lowest, best_left = ranked.gather(1, edge), ranked.gather(1, edge + 1)
    margin = torch.where(lowest == best_left, 0, lowest - best_left)
    margins = margin.expand(-1, width).masked_fill(~filled, torch.inf)
    return Picks(picked.masked_fill(picked == last, -1), margins)


def ranking(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """LongTensor [B, N]: indices by descending score, ties to the lowest, invalid tokens last."""
    ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    if valid is None:
        return order
    # Valid tokens of score -inf come before invalid ones.
    return order.gather(1, (~valid.gather(1, order)).byte().argsort(dim=1, stable=True))
