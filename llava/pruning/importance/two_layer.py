"""Sensitivity of Linear-activation-Linear projectors M(x) = W2 act(W1 x + b1) + b2.

Both ways start from the pre-activations W1 x + b1, which the projector has computed already.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from llava.pruning.importance.derivatives import derivative
from llava.pruning.importance.projectors import TwoLayer
from llava.pruning.importance.triangular import (
    factor_type,
    fold,
    quadratic_form,
    split_parts,
    squared_norms,
    triangular_factor,
)
from llava.pruning.importance.weight_cache import WeightCache

# Elementwise work of a CPU is done in pieces that stay in its caches.
PIECE_BYTES = 2**20

_folded = WeightCache()
_factors = WeightCache()


def pre_activations(parts: TwoLayer, x: Tensor) -> Tensor:
    """Return W1 x + b1, [N, H], of tokens x [N, Dv], in their type."""
    bias = parts.first.bias
    weight = parts.first.weight.to(x.dtype)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def exact(projector: nn.Module, parts: TwoLayer, hidden: Tensor, precision: str) -> Tensor:
    """Return ||J||_F / sqrt(Dv) of every token, [N]: one product with a triangular matrix.

    J = W2 diag(g) W1 with g = act'(W1 x + b1), hence ||J||_F^2 = g^T Q g with the fixed matrix
    Q = (W2^T W2) o (W1 W1^T), o elementwise.

    Args:
        projector: the module that `parts` are of.
        parts: its layers.
        hidden: [N, H] pre-activations, float32 or float64.
        precision: see `product_precision`.
    """
    dtype = hidden.dtype
    folded = _folded.get(
        projector,
        (dtype, factor_type(precision, dtype)),
        lambda: fold(
            parts.first.weight.to(dtype),
            parts.second.weight.to(dtype),
            factor_type(precision, dtype),
        ),
    )
    squares = quadratic_form(derivative(parts.act, hidden), folded, precision)
    # Q is positive semidefinite; clamp what rounding leaves below zero.
    return squares.clamp_min_(0).div_(parts.first.in_features).sqrt_()


def zeroth_order(
    projector: nn.Module,
    parts: TwoLayer,
    hidden: Tensor,
    bank: Tensor,
    step: float,
    precision: str,
    chunk_bytes: int,
) -> Tensor:
    """Return eq. 4 of every token, [N], with one bank of directions for all tokens.

    W1 (x + h u) + b1 = (W1 x + b1) + h W1 u, so the first layer runs once per token and once per
    direction; b2 cancels, so the second layer runs once, on the difference d of activations; and
    ||W2 d|| = ||R d|| with the triangular factor of W2 = QR.

    Args:
        projector, parts, hidden, precision: as in `exact`.
        bank: [m, Dv] directions in the type of `hidden`.
        step: h.
        chunk_bytes: the most that intermediates may take.
    """
    dtype, count = hidden.dtype, len(bank)
    factor = _factors.get(
        projector,
        (dtype, factor_type(precision, dtype)),
        lambda: triangular_factor(parts.second.weight.to(dtype), factor_type(precision, dtype)),
    )
    nudges = step * (bank @ parts.first.weight.to(dtype).T)  # [m, H]
    squares = hidden.new_empty(len(hidden), count)
    # Of every row: two points, two activations, the parts of their difference, a product.
    rows = chunk_bytes // (6 * max(factor.shape) * hidden.element_size())
    for tokens, lanes in blocks(len(hidden), count, rows):
        moved = _differences(parts.act, hidden[tokens], nudges[lanes], precision)
        squares[tokens, lanes] = squared_norms(moved, factor, dtype).view_as(squares[tokens, lanes])
    return squares.sqrt_().mean(dim=1).div_(2 * step)


def _differences(act: nn.Module, at: Tensor, nudges: Tensor, precision: str) -> tuple[Tensor, ...]:
    """Return act(at_i + nudge_j) - act(at_i - nudge_j), see `split_parts`: [t * l, H] each.

    Computed in the type of `at`; only the result is rounded.
    """
    count, lanes, width = len(at), len(nudges), at.shape[1]
    wanted = split_parts(at[:0], precision)  # as many, of these types
    parts = tuple(part.new_empty(count, lanes, width) for part in wanted)
    rows = count * lanes
    if at.device.type == "cpu":
        rows = PIECE_BYTES // (width * at.element_size())
    for tokens, some in blocks(count, lanes, rows):
        centre, nudge = at[tokens, None], nudges[some]
        moved = act(centre + nudge)
        moved = moved.sub_(act(centre - nudge))
        for part, piece in zip(parts, split_parts(moved, precision), strict=True):
            part[tokens, some] = piece
    return tuple(part.view(count * lanes, width) for part in parts)


def blocks(count: int, lanes: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of [count, lanes] that cover it, of at most `rows` elements but at least one."""
    width = max(1, min(lanes, rows))
    height = max(1, rows // width)
    for top in range(0, count, height):
        for left in range(0, lanes, width):
            yield slice(top, min(top + height, count)), slice(left, min(left + width, lanes))
