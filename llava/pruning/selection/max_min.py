"""Greedy max-min diversity: always take the token farthest from everything already taken."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.errors import PruningError
from llava.pruning.finite import largest_of_last
from llava.pruning.importance.normalise import min_max
from llava.pruning.indices import constant
from llava.pruning.kernels import usable
from llava.pruning.late_checks import refuse_if
from llava.pruning.precision import outside_autocast
from llava.pruning.selection.rows import Picks, Rows, check_rows, selectable, top_k

FUSIONS = ("multiply", "sum", "sensitivity", "diversity")


def max_min(
    z: Tensor,
    k: int | Tensor,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    first: str | int = "importance",
    combine: str = "multiply",
) -> Tensor:
    """Select greedily by max-min cosine distance.

    Step t takes the untaken i with the highest w_i * d(i, P), where P is what was taken so far and
    d(i, P) = clamp(1 - max_{j in P} cos(z_i, z_j), 0, 2). Ties go to the lowest index. ZOO-Prune
    (arXiv 2509.24837) eq. 6, 7 and algorithm 1; without weights and with first="isolated" it is
    DivPrune (arXiv 2503.02175).

    Args:
        z: [B, N, D]; half precision is computed in float32, float64 stays float64.
        k: tokens per row, one count or LongTensor [B]; a row padded with -1 got fewer.
        weights: [B, N], importance w, at least 0 to multiply; None means 1 everywhere.
        valid: BoolTensor [B, N]; False is never picked and never compared with.
        first: first pick. "importance": highest weight; "isolated": the token whose nearest
            neighbour is farthest; an int: that token, in every row.
        combine: "multiply", or "sum" for w_i + d(i, P).

    Returns:
        LongTensor [B, max k] in pick order. A row gives the same indices alone and in any batch; on
        the CPU also under any padding.

    Raises:
        PruningError: NaN or inf, weights below 0, k above the number of valid tokens, or wrong
            arguments.
    """
    return max_min_with_margins(
        z, k, weights=weights, valid=valid, first=first, combine=combine
    ).indices


def fuse(rows: Rows, fusion: str = "multiply", precision: str = "float32") -> Picks:
    """Pick by min-max normalised scores and max-min diversity (ZOO-Prune), or an ablation of it.

    Args:
        rows: `rows.weight` multiplies the normalised scores (with "diversity" it replaces them).
        fusion: "multiply" (ZOO-Prune eq. 7), "sum" of the two, "sensitivity" (scores alone, top-k),
            "diversity" (scores unused; the same as DivPrune).
        precision: "float32", or "model" to compare tokens in their own type.
    """
    z, counts, valid = rows.z, rows.counts, rows.valid
    if fusion == "diversity":
        return max_min_with_margins(
            z, counts, weights=rows.weight, valid=valid, first="isolated", precision=precision
        )
    weights = min_max(rows.scored, valid)
    if rows.weight is not None:
        weights = weights * rows.weight
    if fusion == "sensitivity":
        return top_k(weights, counts, valid=valid)
    return max_min_with_margins(
        z, counts, weights=weights, valid=valid, combine=fusion, precision=precision
    )


@outside_autocast()
@torch.no_grad()
def max_min_with_margins(
    z: Tensor,
    k: int | Tensor,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    first: str | int = "importance",
    combine: str = "multiply",
    precision: str = "float32",
    mask_selected: bool = True,
) -> Picks:
    """Select as `max_min`, with every pick's margin: its score minus the best one passed over.

    precision "model" computes in z's own type. Without mask_selected a token that was taken is only
    as far from what was taken as rounding makes it, and may be taken again where others are no
    farther, as in DivPrune's released code.
    """
    if combine not in ("multiply", "sum"):
        raise PruningError(f"combine must be 'multiply' or 'sum', got {combine!r}")
    if first not in ("importance", "isolated") and not isinstance(first, int):
        raise PruningError(f"first must be 'importance', 'isolated' or an index, got {first!r}")
    counts = check_rows(z, k, valid, weights=weights)
    dtype = z.dtype if precision == "model" else torch.promote_types(z.dtype, torch.float32)
    if max(counts, default=0) == 0:
        nothing = torch.empty(len(counts), 0, dtype=dtype, device=z.device)
        return Picks(nothing.long(), nothing)
    if mask_selected and dtype == torch.float32 and usable(z, z.shape[1]):
        if weights is not None:
            weights = _checked_weights(weights.to(dtype), valid, combine)
        return _pick_by_kernel(z, weights, valid, counts, first, combine)
    own, inside = list(z), valid
    tokens = torch.arange(z.shape[1], device=z.device).expand(z.shape[:2])
    if valid is not None and z.device.type == "cpu":  # fewer tokens, so fewer products
        rows = [selectable(z, valid, row) for row in range(z.shape[0])]
        own = [z[row, inner] for row, inner in enumerate(rows)]
        tokens = pad_sequence(rows, batch_first=True, padding_value=-1)
        inside = tokens >= 0
        if weights is not None:
            weights = weights.gather(1, tokens.clamp(min=0))
    elif valid is not None:
        own = [row.masked_fill(~real[:, None], 0) for row, real in zip(z, valid, strict=True)]
    if weights is not None:
        weights = _checked_weights(weights.to(dtype), inside, combine)
    similarities = [cosine(row.to(dtype).contiguous()) for row in own]
    itself = None
    if not mask_selected:
        itself = pad_sequence([1 - each.diagonal() for each in similarities], batch_first=True)
    distances = distances_of(similarities)
    score = first_score(weights, tokens, inside, first, distances)
    picks, margins = greedy(distances, weights, score, inside, max(counts), combine, itself=itself)
    indices = tokens.gather(1, picks)
    if min(counts) == max(counts):
        return Picks(indices, margins)
    slots = torch.arange(max(counts), device=z.device)
    filled = slots < constant(tuple(counts), z.device)[:, None]
    return Picks(indices.masked_fill(~filled, -1), margins.masked_fill(~filled, torch.inf))


def _pick_by_kernel(
    z: Tensor,
    weights: Tensor | None,
    inside: Tensor | None,
    counts: list[int],
    first: str | int,
    combine: str,
) -> Picks:
    """Pick as `max_min_with_margins` with the loop in one kernel, in float32."""
    from llava.pruning.kernels.max_min import max_min_picks

    grams = [_product(row) for row in z]
    gram = grams[0][None] if len(grams) == 1 else torch.stack(grams)
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt()  # norms of at least 1e-12
    refuse_if(z.device, partial(_not_positive, scale, inside), _no_distances)
    distances = gram
    if first == "isolated":
        cosines = (gram + gram.mT).div_(2).mul_(scale[:, :, None] * scale[:, None])
        distances = distances_of([*cosines])
    tokens = torch.arange(z.shape[1], device=z.device).expand(z.shape[:2])
    score = first_score(weights, tokens, inside, first, distances)
    wanted = constant(tuple(counts), z.device)
    return max_min_picks(gram, scale, weights, score, inside, wanted, max(counts), combine)


def _product(z: Tensor) -> Tensor:
    """Return the float32 products [n, n] of one row's tokens z [n, D].

    Of half-precision numbers every product fits float32, so tensor cores lose nothing.
    """
    if z.data_ptr() % 16:  # a row of a batch, where one alone would lie on a boundary
        z = z.clone()
    if z.is_cuda and z.element_size() == 2:
        return torch.mm(z, z.T, out_dtype=torch.float32)
    wide = z.float()
    return wide @ wide.T


def _not_positive(scale: Tensor, inside: Tensor | None) -> Tensor:
    bad = ~(scale > 0)
    return bad if inside is None else bad & inside


def _checked_weights(weights: Tensor, inside: Tensor | None, combine: str) -> Tensor:
    """Return weights [B, n], 0 where not `inside`; PruningError for those that cannot be used."""
    if inside is not None:
        weights = weights.masked_fill(~inside, 0)
    refuse_if(
        weights.device,
        lambda: ~weights.isfinite(),
        lambda: PruningError("weights contain NaN or inf"),
    )
    if combine == "multiply":
        refuse_if(
            weights.device,
            lambda: weights < 0,
            lambda: PruningError("weights below 0 would turn distance around; give at least 0"),
        )
    return weights


def distances_of(similarities: list[Tensor]) -> Tensor:
    """Return 1 - cos [B, n, n] of cosine similarities [n_b, n_b] of every row, n the largest n_b.

    The diagonal and the padding are 2, the largest distance, so no token is its own neighbour. A
    single row is overwritten: fresh memory of this size costs more than the subtraction.
    """
    if len(similarities) == 1:
        distances = similarities[0][None]
    else:
        size = max(len(similarity) for similarity in similarities)
        distances = torch.stack(
            [
                pad(similarity, (0, size - len(similarity)) * 2, value=-1.0)
                for similarity in similarities
            ]
        )
    torch.sub(distances.new_ones(()), distances, out=distances)
    distances.diagonal(dim1=1, dim2=2).fill_(2.0)
    return distances


@outside_autocast()
def cosine(z: Tensor) -> Tensor:
    """Return the cosine similarities [n, n] of one row's valid tokens z [n, D].

    One matrix product per row, on a freshly allocated operand: inside a batched product, or at
    another memory offset, the same numbers may be summed in another order. Made exactly symmetric,
    so that two mutually nearest tokens tie and the tie goes to the lowest index.
    """
    smallest = max(1e-12, torch.finfo(z.dtype).tiny)  # 1e-12 is 0 in half precision
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    # The norm of finite half-precision tokens may be beyond their type.
    seen = norm if z.element_size() > 2 else largest_of_last(z)
    refuse_if(z.device, lambda: ~seen.isfinite(), _no_distances)
    unit = z / norm.clamp_min(smallest)
    gram = unit @ unit.T
    return (gram + gram.T).div_(2)


def _no_distances() -> PruningError:
    return PruningError("z contains NaN or inf; distances to it mean nothing")


def greedy(
    distances: Tensor,
    weights: Tensor | None,
    score: Tensor,
    inside: Tensor | None,
    k: int,
    combine: str,
    *,
    itself: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return positions [B, k] and margins [B, k] of the greedy picks of all rows at once.

    On vectors this short a call costs more than its arithmetic. So what a pick leaves of every
    token's score is worked out beforehand, for all picks; a step is then one look-up and one
    minimum, which weights of at least 0 allow: w min(d, d') = min(w d, w d'), bit for bit.

    Args:
        distances: [B, n, n] of `distances_of`; overwritten.
        weights: [B, n] or None.
        score: [B, n] of the first pick.
        inside: BoolTensor [B, n], what may be taken; None for everything. A row that has nothing
            left continues with meaningless picks, which the caller cuts off.
        k: number of picks, at least 1.
        itself: [B, n], every token's distance to itself, all rounding, where a token may be taken
            again; None for never.
    """
    batch, size = score.shape
    if itself is None:
        limits = distances.clamp_(0, 2)
    else:
        limits = distances
        limits.diagonal(dim1=1, dim2=2).copy_(itself)
    if weights is not None:
        limits = (limits.mul_ if combine == "multiply" else limits.add_)(weights[:, None])
    if inside is not None:
        limits.masked_fill_(~inside[:, None], -torch.inf)
        score = score.masked_fill(~inside, -torch.inf)
    if itself is None:
        exclude(limits)
    rows = limits.view(batch * size, size)
    first_row = torch.arange(batch, device=score.device) * size
    history = score.new_empty(k, batch, size)
    scores = history.unbind()
    scores[0].copy_(score)
    left = torch.full_like(score, torch.inf)
    picks = [first_argmax(scores[0])]
    for following in scores[1:]:
        limit = rows.index_select(0, picks[-1] + first_row)
        left = torch.minimum(left, limit, out=following)
        picks.append(first_argmax(left))
    steps = torch.stack(picks)[..., None]
    best = history.gather(2, steps)[..., 0]
    passed_over = history.scatter_(2, steps, -torch.inf).amax(dim=2)
    return steps[..., 0].T, (best - passed_over).T


def first_score(
    weights: Tensor | None,
    tokens: Tensor,
    inside: Tensor | None,
    first: str | int,
    distances: Tensor,
) -> Tensor:
    """Return the first pick's score [B, n] of `tokens` [B, n], the indices the caller knows.

    `distances` [B, n, n] is read for "isolated" alone, beyond that its type.
    """
    if isinstance(first, int):
        hits = tokens == first if inside is None else (tokens == first) & inside
        refuse_if(
            hits.device,
            lambda: ~hits.any(dim=1),
            lambda: PruningError(f"first={first} is not a valid token"),
        )
        return torch.where(hits, 0.0, -torch.inf).to(distances.dtype)
    if first == "isolated":
        if inside is not None:
            distances = distances.masked_fill(~inside[:, None], 2.0)
        return distances.amin(dim=-1)
    return distances.new_ones(tokens.shape) if weights is None else weights


def exclude(limits: Tensor) -> None:
    """Put every token out of reach of its own pick: in place, `limits` [B, n, n]."""
    limits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)


def first_argmax(score: Tensor) -> Tensor:
    """Return the index [B] of each row's highest score, the lowest of several.

    torch.argmax promises that.
    """
    return score.argmax(dim=-1)
