"""Sensitivity of Linear-activation-Linear projectors M(x) = W2 act(W1 x + b1) + b2.

Both ways start from the pre-activations W1 x + b1, which the projector has computed already.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
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

_forms = WeightCache()
_factors = WeightCache()


class Tangent(NamedTuple):
    """What g^T Q g is more than (g - c)^T Q (g - c): (g - c)^T slope + constant.

    Attributes:
        centre: c [H].
        slope: 2 Q c, [H].
        constant: c^T Q c, a scalar tensor.
    """

    centre: Tensor
    slope: Tensor
    constant: Tensor


def pre_activations(parts: TwoLayer, x: Tensor) -> Tensor:
    """Return W1 x + b1, [N, H], of tokens x [N, Dv], in their type."""
    weight = parts.first.weight.to(x.dtype)
    return nn.functional.linear(x, weight, _bias(parts, x.dtype))


def exact(projector: nn.Module, parts: TwoLayer, hidden: Tensor, precision: str) -> Tensor:
    """Return ||J||_F / sqrt(Dv) of every token, [N]: one product with a triangular matrix.

    J = W2 diag(g) W1 with g = act'(W1 x + b1), hence ||J||_F^2 = g^T Q g with the fixed matrix
    Q = (W2^T W2) o (W1 W1^T), o elementwise.

    Products in bfloat16 take only what g differs by from its value c at x = 0, because rounding
    errors shrink with it; the rest is a float32 product with a vector.

    Args:
        projector: the module that `parts` are of.
        parts: its layers.
        hidden: [N, H] pre-activations, float32 or float64.
        precision: see `product_precision`.
    """
    dtype, narrow = hidden.dtype, factor_type(precision, hidden.dtype)
    folded, tangent = _forms.get(projector, (dtype, narrow), lambda: _form(parts, dtype, narrow))
    g = derivative(parts.act, hidden)
    if tangent is None:
        squares = quadratic_form(g, folded, precision)
    else:
        g = g.sub_(tangent.centre)
        squares = quadratic_form(g, folded, precision) + (g @ tangent.slope + tangent.constant)
    # Q is positive semidefinite; clamp what rounding leaves below zero.
    return squares.clamp_min_(0).div_(parts.first.in_features).sqrt_()


def exact_by_kernels(projector: nn.Module, parts: TwoLayer, hidden: Tensor, kind: str) -> Tensor:
    """Return `exact` with products in bfloat16, [R], by kernels that take all tiles at once.

    A row gives the same whatever other rows there are.

    Args:
        projector, parts: as in `exact`.
        hidden: [R, H] pre-activations, any type but float64.
        kind: see `derivative_kind`.
    """
    from llava.pruning.kernels.quadratic import centred_derivative
    from llava.pruning.kernels.quadratic import quadratic_form as fused_form

    dtype, narrow = torch.float32, torch.bfloat16
    folded, tangent = _forms.get(projector, (dtype, narrow), lambda: _form(parts, dtype, narrow))
    assert tangent is not None  # it always has one in bfloat16
    d, linear = centred_derivative(hidden, kind, tangent.centre, tangent.slope, narrow)
    return fused_form(d, folded, linear, tangent.constant, parts.first.in_features)


def _form(
    parts: TwoLayer, dtype: torch.dtype, narrow: torch.dtype
) -> tuple[Tensor, Tangent | None]:
    """Return Q as `fold` arranges it, [H, H] in `narrow`, and what is added where that rounds."""
    folded = fold(parts.first.weight.to(dtype), parts.second.weight.to(dtype))
    if narrow == dtype:
        return folded, None
    centre = derivative(parts.act, _origin(parts, dtype))
    slope = folded @ centre + centre @ folded
    return folded.to(narrow), Tangent(centre, slope, slope @ centre / 2)


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
    ||W2 d|| = ||R d|| with the triangular factor of W2 = QR. As in `exact`, products in bfloat16
    take only what d differs by from its value at x = 0.

    Args:
        projector, parts, hidden, precision: as in `exact`.
        bank: [m, Dv] directions in the type of `hidden`.
        step: h.
        chunk_bytes: the most that intermediates may take.
    """
    dtype, count = hidden.dtype, len(bank)
    factor, narrow = triangular_factors(projector, parts.second.weight, dtype, precision)
    nudges = step * (bank @ parts.first.weight.to(dtype).T)  # [m, H]
    centres = added = None
    if precision != "float32":
        origin = _origin(parts, dtype)
        centres = parts.act(origin + nudges) - parts.act(origin - nudges)
        added = centres @ factor.T
    squares = hidden.new_empty(len(hidden), count)
    # Of every row: two points, two activations, the parts of their difference, a product.
    rows = chunk_bytes // (6 * max(factor.shape) * hidden.element_size())
    for tokens, lanes in blocks(len(hidden), count, rows):
        moved = _differences(
            parts.act, hidden[tokens], nudges[lanes], precision, _some(centres, lanes)
        )
        norms = squared_norms(moved, narrow, dtype, _some(added, lanes))
        squares[tokens, lanes] = norms.view_as(squares[tokens, lanes])
    return squares.sqrt_().mean(dim=1).div_(2 * step)


def triangular_factors(
    projector: nn.Module, weight: Tensor, dtype: torch.dtype, precision: str
) -> tuple[Tensor, Tensor]:
    """Return R of a projector's W2 = QR in `dtype`, and in the type of the product's operands."""
    factor = _factors.get(projector, dtype, lambda: triangular_factor(weight.to(dtype)))
    narrow = factor_type(precision, dtype)
    if narrow == dtype:
        return factor, factor
    return factor, _factors.get(projector, (dtype, narrow), lambda: factor.to(narrow))


def _differences(
    act: nn.Module, at: Tensor, nudges: Tensor, precision: str, centres: Tensor | None
) -> tuple[Tensor, ...]:
    """Return act(at_i + nudge_j) - act(at_i - nudge_j) - centre_j, see `split_parts`: [t * l, H].

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
        if centres is not None:
            moved = moved.sub_(centres[some])
        for part, piece in zip(parts, split_parts(moved, precision), strict=True):
            part[tokens, some] = piece
    return tuple(part.view(count * lanes, width) for part in parts)


def _some(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _bias(parts: TwoLayer, dtype: torch.dtype) -> Tensor | None:
    bias = parts.first.bias
    return None if bias is None else bias.to(dtype)


def _origin(parts: TwoLayer, dtype: torch.dtype) -> Tensor:
    """Return the pre-activations of x = 0: [H]."""
    bias, weight = _bias(parts, dtype), parts.first.weight
    return weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias


def blocks(count: int, lanes: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of [count, lanes] that cover it, of at most `rows` elements but at least one."""
    width = max(1, min(lanes, rows))
    height = max(1, rows // width)
    for top in range(0, count, height):
        for left in range(0, lanes, width):
            yield slice(top, min(top + height, count)), slice(left, min(left + width, lanes))
