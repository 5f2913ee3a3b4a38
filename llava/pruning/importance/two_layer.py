"""Sensitivity of Linear-activation-Linear projectors M(x) = W2 act(W1 x + b1) + b2.

Both ways start from the pre-activations W1 x + b1, which the projector has computed already.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.pruning.importance.derivatives import derivative
from llava.pruning.importance.projectors import TwoLayer
from llava.pruning.importance.triangular import (
    ACCELERATOR_BLOCK,
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
    bank: Tensor,
    step: float,
    precision: str,
    chunk_bytes: int,
) -> Callable[[Tensor], Tensor]:
    """Return how pre-activations [N, H] are scored by eq. 4, [N], with one bank for all tokens.

    W1 (x + h u) + b1 = (W1 x + b1) + h W1 u, so the first layer runs once per token and once per
    direction; b2 cancels, so the second layer runs once, on the difference d of activations; and
    ||W2 d|| = ||R d|| with the triangular factor of W2 = QR. As in `exact`, products in bfloat16
    take only what d differs by from its value at x = 0.

    Args:
        projector, parts, precision: as in `exact`.
        bank: [m, Dv] directions in the type of the scores.
        step: h.
        chunk_bytes: the most that intermediates may take, see `plan`.
    """
    dtype, count = bank.dtype, len(bank)
    factor, narrow = triangular_factors(projector, parts.second.weight, dtype, precision)
    nudges = step * (bank @ parts.first.weight.to(dtype).T)  # [m, H]
    centres = added = None
    if precision != "float32":
        origin = _origin(parts, dtype)
        centres = parts.act(origin + nudges) - parts.act(origin - nudges)
        added = centres @ factor.T
    rows, piece = plan(bank.device, factor, precision, chunk_bytes)

    def score(hidden: Tensor) -> Tensor:
        squares = hidden.new_empty(len(hidden), count)
        for tokens, lanes in blocks(len(hidden), count, rows):
            at, own = hidden[tokens], _some(centres, lanes)
            norms = squared_norms(
                _differences(parts.act, at, nudges[lanes], precision, own, piece),
                narrow,
                dtype,
                _some(added, lanes),
            )
            squares[tokens, lanes] = norms.view_as(squares[tokens, lanes])
        return squares.sqrt_().mean(dim=1).div_(2 * step)

    return score


def plan(device: torch.device, factor: Tensor, precision: str, chunk_bytes: int) -> tuple[int, int]:
    """Return how many differences of activations are multiplied, and are computed, at a time.

    A CPU computes them in pieces that stay in its caches. On an accelerator every step is a launch
    that takes the host longer than a small one takes the device. So there one half of the bytes
    holds differences, of which there are as many as that allows, and the other half what they are
    computed with, and later their products.

    Args:
        device: that computes.
        factor: R [r, H] in the type of the scores.
        precision: see `product_precision`.
        chunk_bytes: the most that intermediates may take.
    """
    width, size = factor.shape[1], factor.element_size()
    if device.type == "cpu":
        # Of every row: two points, two activations, the parts of their difference, a product.
        return chunk_bytes // (6 * max(factor.shape) * size), PIECE_BYTES // (width * size)
    operands = split_parts(factor[:0], precision)
    held = width * sum(part.element_size() for part in operands)
    # Products of a block of R with every operand, beside that of the block before.
    products = (len(operands) + 1) * min(ACCELERATOR_BLOCK, len(factor)) * size
    # An activation, a point, and two intermediates of the activation there.
    return chunk_bytes // 2 // max(held, products), chunk_bytes // 2 // (4 * width * size)


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
    act: nn.Module,
    at: Tensor,
    nudges: Tensor,
    precision: str,
    centres: Tensor | None,
    piece: int,
) -> tuple[Tensor, ...]:
    """Return act(at_i + nudge_j) - act(at_i - nudge_j) - centre_j, see `split_parts`: [t * l, H].

    Computed `piece` rows at a time in the type of `at`; only the result is rounded.
    """
    count, lanes, width = len(at), len(nudges), at.shape[1]
    wanted = split_parts(at[:0], precision)  # as many, of these types
    parts = tuple(part.new_empty(count, lanes, width) for part in wanted)
    for tokens, some in blocks(count, lanes, piece):
        _write_differences(
            act,
            at[tokens, None],
            nudges[some],
            precision,
            _some(centres, some),
            [part[tokens, some] for part in parts],
        )
    return tuple(part.view(count * lanes, width) for part in parts)


def _write_differences(
    act: nn.Module,
    at: Tensor,
    nudges: Tensor,
    precision: str,
    centres: Tensor | None,
    out: list[Tensor],
) -> None:
    """Write the differences of at [t, 1, H] and nudges [l, H] into their parts [t, l, H]."""
    moved = act(at + nudges)
    moved = moved.sub_(act(at - nudges))
    if centres is not None and len(out) == 1:
        torch.sub(moved, centres, out=out[0])  # one pass, rounded once
        return
    moved = moved if centres is None else moved.sub_(centres)
    for target, part in zip(out, split_parts(moved, precision), strict=True):
        target.copy_(part)


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
