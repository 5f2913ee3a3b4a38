"""Greedy max-min diversity: always take the token farthest from everything already taken."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.errors import PruningError
from llava.pruning.selection.picks import Picks


def max_min(
    z: Tensor,
    k: int | Tensor,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    first: str | int = "importance",
    combine: str = "multiply",
) -> Tensor:
    """Greedy max-min selection on cosine distance; LongTensor [B, max k] in pick order.

    Step t takes the untaken i with the highest w_i * d(i, P), where P is what was taken so far and
    d(i, P) = clamp(1 - max_{j in P} cos(z_i, z_j), 0, 2). Ties go to the lowest index. ZOO-Prune
    (arXiv 2509.24837) eq. 6, 7 and algorithm 1; without weights and with first="isolated" it is
    DivPrune (arXiv 2503.02175).

    Args:
        z: [B, N, D]; half precision is computed in float32, float64 stays float64.
        k: tokens per row, one count or LongTensor [B]; a row padded with -1 got fewer.
        weights: [B, N], importance w; None means 1 everywhere.
        valid: BoolTensor [B, N]; False is never picked and never compared with.
        first: first pick. "importance": highest weight; "isolated": the token whose nearest
            neighbour is farthest; an int: that token, in every row.
        combine: "multiply", or "sum" for w_i + d(i, P).

    A row gives the same indices alone, in any batch and under any padding. Raises PruningError for
    NaN or inf, for k above the number of valid tokens, and for wrong arguments.
    """
    return max_min_with_margins(
        z, k, weights=weights, valid=valid, first=first, combine=combine
    ).indices


def max_min_with_margins(
    z: Tensor,
    k: int | Tensor,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    first: str | int = "importance",
    combine: str = "multiply",
) -> Picks:
    """As `max_min`, with the margin of every pick: its score minus the best score passed over."""
    if z.dim() != 3:
        raise PruningError(f"z must be [B, N, D], got {list(z.shape)}")
    if combine not in ("multiply", "sum"):
        raise PruningError(f"combine must be 'multiply' or 'sum', got {combine!r}")
    if first not in ("importance", "isolated") and not isinstance(first, int):
        raise PruningError(f"first must be 'importance', 'isolated' or an index, got {first!r}")
    for name, value in (("weights", weights), ("valid", valid)):
        if value is not None and value.shape != z.shape[:2]:
            raise PruningError(f"{name} must be {list(z.shape[:2])}, got {list(value.shape)}")
    counts = check_counts(k, z, valid)
    width = max(counts, default=0)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if width == 0:
        nothing = torch.empty(len(counts), 0, dtype=dtype, device=z.device)
        return Picks(nothing.long(), nothing)
    tokens, similarity = _similarities(z, valid, dtype)
    inside = tokens >= 0
    if weights is None:
        weights = similarity.new_full(tokens.shape, 0.0 if combine == "sum" else 1.0)
    else:
        weights = weights.to(dtype).gather(1, tokens.clamp(min=0)).masked_fill(~inside, 0)
        if not weights.isfinite().all():
            raise PruningError("weights hold NaN or inf")
    score = _first_score(similarity, weights, inside, tokens, first)
    picks, margins = _greedy(similarity, weights, score, ~inside, width, combine)
    filled = torch.arange(width) < torch.tensor(counts)[:, None]
    filled = filled.to(z.device)
    indices = tokens.gather(1, picks).masked_fill(~filled, -1)
    return Picks(indices, margins.masked_fill(~filled, torch.inf))


def check_counts(k: int | Tensor, rows: Tensor, valid: Tensor | None) -> list[int]:
    """`k` as one int per row of `rows` [B, N, ...]; PruningError if a row cannot give as many."""
    batch, total = rows.shape[:2]
    counts = [int(c) for c in k.tolist()] if isinstance(k, Tensor) else [int(k)] * batch
    if len(counts) != batch:
        raise PruningError(f"k has {len(counts)} entries for {batch} rows")
    room = [total] * batch if valid is None else [int(n) for n in valid.sum(dim=1).tolist()]
    for row, (count, limit) in enumerate(zip(counts, room, strict=True)):
        if not 0 <= count <= limit:
            raise PruningError(f"cannot pick {count} of the {limit} valid tokens of row {row}")
    return counts


def selectable(z: Tensor, valid: Tensor | None, row: int) -> Tensor:
    """LongTensor [n]: indices of a row's valid tokens."""
    tokens = torch.arange(z.shape[1], device=z.device)
    return tokens if valid is None else tokens[valid[row]]


def _similarities(z: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LongTensor [B, n] of valid tokens, padded with -1, and their similarities [B, n, n]."""
    rows = [selectable(z, valid, row) for row in range(z.shape[0])]
    grams = [cosine(z[row, tokens].to(dtype)) for row, tokens in enumerate(rows)]
    if all(len(tokens) == len(rows[0]) for tokens in rows):
        return torch.stack(rows), torch.stack(grams)
    size = max(len(tokens) for tokens in rows)
    padded = [torch.nn.functional.pad(g, (0, size - len(g)) * 2) for g in grams]
    return pad_sequence(rows, batch_first=True, padding_value=-1), torch.stack(padded)


def cosine(z: Tensor) -> Tensor:
    """[n, n] cosine similarities of one row's valid tokens z [n, D].

    One matrix product per row, on a freshly allocated operand: inside a batched product, or at
    another memory offset, the same numbers may be summed in another order. Made exactly symmetric,
    so that two mutually nearest tokens tie and the tie goes to the lowest index.
    """
    if not z.isfinite().all():
        raise PruningError("z holds NaN or inf; distances to it mean nothing")
    unit = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    gram = unit @ unit.T
    return (gram + gram.T) / 2


def _greedy(
    similarity: Tensor, weights: Tensor, score: Tensor, taken: Tensor, k: int, combine: str
) -> tuple[Tensor, Tensor]:
    """Positions [B, k] and margins [B, k] of the greedy picks of all rows at once. Time k * n.

    Args:
        similarity: [B, n, n].
        weights: [B, n].
        score: [B, n] of the first pick.
        taken: BoolTensor [B, n], out of reach from the start. A row that has nothing left goes on
            with meaningless picks, which the caller cuts off.
    """
    batch = torch.arange(len(score), device=score.device)
    nearest = torch.full_like(weights, -torch.inf)  # highest cosine to anything taken
    picks, margins = [], []
    for _ in range(k):
        score = exclude(score, taken)
        pick = first_argmax(score)
        best = score[batch, pick]
        taken = taken.scatter(1, pick[:, None], True)
        margins.append(best - exclude(score, taken).amax(dim=1))
        picks.append(pick)
        nearest = torch.maximum(nearest, similarity[batch, pick])
        distance = (1 - nearest).clamp(0, 2)
        score = weights * distance if combine == "multiply" else weights + distance
    return torch.stack(picks, dim=1), torch.stack(margins, dim=1)


def _first_score(
    similarity: Tensor, weights: Tensor, inside: Tensor, tokens: Tensor, first: str | int
) -> Tensor:
    """[B, n] score of the first pick."""
    if isinstance(first, int):
        hits = tokens == first
        if not hits.any(dim=1).all():
            raise PruningError(f"first={first} is not a valid token")
        return torch.where(hits, 0.0, -torch.inf).to(weights.dtype)
    if first == "importance":
        return weights
    itself = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return 1 - similarity.masked_fill(itself | ~inside[:, None], -1).amax(dim=-1)


def exclude(score: Tensor, taken: Tensor) -> Tensor:
    """`score` with taken tokens out of reach."""
    return score.masked_fill(taken, -torch.inf)


def first_argmax(score: Tensor) -> Tensor:
    """[B] index of each row's highest score, the lowest of several: torch.argmax promises that."""
    return score.argmax(dim=-1)
