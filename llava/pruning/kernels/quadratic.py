"""Sensitivity of Linear-activation-Linear projectors in Triton: d = act'(h) - c and d^T U d.

The torch code they stand for is `importance.two_layer.exact`. U is upper triangular
(`importance.triangular.fold`): blocks below its diagonal are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


def derivative_kind(act: nn.Module) -> str | None:
    """Return what `centred_derivative` calls the activation; None where it has no formula."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {nn.SiLU: "silu", nn.ReLU: "relu"}.get(type(act))


def centred_derivative(
    hidden: Tensor, kind: str, centre: Tensor, slope: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return d = act'(hidden) - centre, rounded once to `dtype`, and d . slope before that.

    Args:
        hidden: pre-activations [R, H], any floating type but float64.
        kind: of `derivative_kind`.
        centre, slope: [H] float32.
        dtype: of the result.

    Returns:
        [R, H] and float32 [R].
    """
    rows, width = hidden.shape
    made = torch.empty(rows, width, dtype=dtype, device=hidden.device)
    linear = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows:
        with torch.cuda.device_of(hidden):  # triton launches on the current GPU
            _derivative[(rows,)](
                hidden.contiguous(), centre, slope, made, linear, width, KIND=kind, BLOCK=1024
            )
    return made, linear


def quadratic_form(
    d: Tensor,
    u: Tensor,
    linear: Tensor | None = None,
    constant: Tensor | None = None,
    width: int = 1,
) -> Tensor:
    """Return sqrt(max(d_i^T U d_i + linear_i + constant, 0) / width) of every row.

    Products and sums are float32, without atomics, so a row gives the same whatever other rows
    there are.

    Args:
        d: [R, H], float32, bfloat16 or float16.
        u: [H, H] in the same type, upper triangular; what is below its diagonal is not read.
        linear: [R] float32; None for 0.
        constant: float32 scalar on the same device; None for 0.
        width: Dv, which makes the result the root mean square of ||J u||.

    Returns:
        [R] float32.
    """
    rows, hidden = d.shape
    scores = torch.empty(rows, dtype=torch.float32, device=d.device)
    if rows == 0:
        return scores
    if d.dtype == torch.bfloat16 and not d.is_cuda:
        # Triton's interpreter cannot multiply bfloat16; float32 holds the same numbers.
        d, u = d.float(), u.float()
    tile = tiles(d.dtype == torch.float32)
    blocks = triton.cdiv(hidden, tile[1])
    partial = torch.empty(blocks, rows, dtype=torch.float32, device=d.device)
    with torch.cuda.device_of(d):
        _triangle[(triton.cdiv(rows, tile[0]), blocks)](
            d.contiguous(),
            u.contiguous(),
            partial,
            rows,
            hidden,
            ROWS=tile[0],
            COLUMNS=tile[1],
            DEPTH=tile[2],
            num_warps=4,
            num_stages=3,
        )
        _join[(triton.cdiv(rows, 128),)](
            partial, linear, constant, scores, rows, blocks, width, BLOCK=128, num_warps=4
        )
    return scores


def tiles(full: bool) -> tuple[int, int, int]:
    """Return rows, columns and depth of a program's products.

    Full float32 products have no tensor cores, so their sums lie in more registers.
    """
    return (64, 64, 32) if full else (64, 128, 64)


@triton.jit
def _derivative(
    hidden, centre, slope, made, linear, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < width
        x = tl.load(hidden + row * width + place, mask=inside, other=0.0).to(tl.float32)
        g = _act_derivative(x, KIND)
        d = g - tl.load(centre + place, mask=inside, other=0.0)
        total += d * tl.load(slope + place, mask=inside, other=0.0)
        tl.store(made + row * width + place, d.to(made.dtype.element_ty), mask=inside)
    tl.store(linear + row, tl.sum(total, axis=0))


@triton.jit
def _act_derivative(x, KIND: tl.constexpr):
    if KIND == "gelu":  # Phi(x) + x phi(x)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        g = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif KIND == "gelu_tanh":
        # t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3): (1 + t)/2 = s(2u), (1 - t)/2 = s(-2u)
        square = x * x
        u2 = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
        s = tl.sigmoid(u2)
        g = s + x * s * tl.sigmoid(-u2) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    elif KIND == "silu":
        s = tl.sigmoid(x)
        g = s * (1.0 + x * tl.sigmoid(-x))
    else:
        tl.static_assert(KIND == "relu")
        g = tl.where(x > 0.0, 1.0, 0.0)
        g = tl.where(x == x, g, x)
    return g


@triton.jit
def _triangle(
    d,
    u,
    partial,
    rows,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # The last columns have the most blocks above the diagonal, so they are begun first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first = block * COLUMNS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    has_row, has_column = row < rows, column < hidden
    lines = d + row.to(tl.int64)[:, None] * hidden
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, first, DEPTH):
        at = start + depth
        left = tl.load(lines + at[None, :], mask=has_row[:, None], other=0.0)
        above = u + at.to(tl.int64)[:, None] * hidden + column[None, :]
        right = tl.load(above, mask=has_column[None, :], other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
    for start in range(first, first + COLUMNS, DEPTH):
        at = start + depth
        has_depth = at < hidden
        left = tl.load(lines + at[None, :], mask=has_row[:, None] & has_depth[None, :], other=0.0)
        beside = u + at.to(tl.int64)[:, None] * hidden + column[None, :]
        upper = (at[:, None] <= column[None, :]) & has_column[None, :]
        right = tl.load(beside, mask=has_depth[:, None] & upper, other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
    own = tl.load(lines + column[None, :], mask=has_row[:, None] & has_column[None, :], other=0.0)
    sums = tl.sum(products * own.to(tl.float32), axis=1)
    tl.store(partial + block.to(tl.int64) * rows + row, sums, mask=has_row)


@triton.jit(do_not_specialize=["width"])
def _join(partial, linear, constant, scores, rows, blocks, width, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, blocks):
        total += tl.load(partial + block * rows + row, mask=inside, other=0.0)
    if linear is not None:
        total += tl.load(linear + row, mask=inside, other=0.0)
    if constant is not None:
        total += tl.load(constant)
    # What rounding leaves below zero is clamped; NaN passes.
    total = tl.where(total < 0.0, 0.0, total)
    total = tl.sqrt_rn(tl.div_rn(total, width.to(tl.float32)))
    tl.store(scores + row, total, mask=inside)
