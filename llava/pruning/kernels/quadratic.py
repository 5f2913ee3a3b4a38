"""Sensitivity of Linear-activation-Linear projectors in Triton: g = act'(h) and g^T Q g.

The torch code they stand for is `importance.sensitivity`. Q is symmetric, so blocks above its
diagonal count twice and those below are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


def derivative_kind(act: nn.Module) -> str | None:
    """Return what `activation_derivative` calls the activation; None where it has no formula."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {nn.SiLU: "silu", nn.ReLU: "relu"}.get(type(act))


def activation_derivative(hidden: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return act'(hidden), computed in float32 and rounded once to `dtype`.

    Args:
        hidden: pre-activations [R, H], any floating type but float64.
        kind: of `derivative_kind`.
        dtype: of the result.
    """
    hidden = hidden.contiguous()
    made = torch.empty_like(hidden, dtype=dtype)
    if hidden.numel():
        block = 1024
        _derivative[(triton.cdiv(hidden.numel(), block),)](
            hidden, made, hidden.numel(), KIND=kind, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
    return made


def quadratic_form(g: Tensor, q: Tensor, width: int | None = None) -> Tensor:
    """Return g_i^T Q g_i of every row: products and sums in float32, no atomics.

    A row gives the same whatever other rows there are.

    Args:
        g: [R, H], float32, bfloat16 or float16.
        q: [H, H] in the same type, symmetric.
        width: Dv. With it, sqrt(max(g^T Q g, 0) / Dv), the root mean square of ||J u||.

    Returns:
        [R] float32.
    """
    rows, hidden = g.shape
    scores = torch.empty(rows, dtype=torch.float32, device=g.device)
    if rows == 0:
        return scores
    if g.dtype == torch.bfloat16 and not g.is_cuda:
        # Triton's interpreter cannot multiply bfloat16; float32 holds the same numbers.
        g, q = g.float(), q.float()
    tile = tiles(g.dtype == torch.float32)
    blocks = triton.cdiv(hidden, tile[1])
    partial = torch.empty(blocks, rows, dtype=torch.float32, device=g.device)
    _triangle[(triton.cdiv(rows, tile[0]), blocks)](
        g.contiguous(),
        q.contiguous(),
        partial,
        rows,
        hidden,
        ROWS=tile[0],
        COLUMNS=tile[1],
        DEPTH=tile[2],
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    _join[(triton.cdiv(rows, 128),)](
        partial,
        scores,
        rows,
        blocks,
        width or 1,
        ROOT=width is not None,
        BLOCK=128,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return scores


def tiles(full: bool) -> tuple[int, int, int]:
    """Return rows, columns and depth of a program's products.

    Full float32 products have no tensor cores, so their sums lie in more registers.
    """
    return (64, 64, 32) if full else (64, 128, 64)


@triton.jit
def _derivative(hidden, made, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < total
    x = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(made + places, g.to(made.dtype.element_ty), mask=inside)


@triton.jit
def _triangle(
    g,
    q,
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
    lines = g + row.to(tl.int64)[:, None] * hidden
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, first, DEPTH):
        at = start + depth
        left = tl.load(lines + at[None, :], mask=has_row[:, None], other=0.0)
        above = q + at.to(tl.int64)[:, None] * hidden + column[None, :]
        right = tl.load(above, mask=has_column[None, :], other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
    products = products * 2.0
    for start in range(first, first + COLUMNS, DEPTH):
        at = start + depth
        has_depth = at < hidden
        left = tl.load(lines + at[None, :], mask=has_row[:, None] & has_depth[None, :], other=0.0)
        beside = q + at.to(tl.int64)[:, None] * hidden + column[None, :]
        right = tl.load(beside, mask=has_depth[:, None] & has_column[None, :], other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
    own = tl.load(lines + column[None, :], mask=has_row[:, None] & has_column[None, :], other=0.0)
    sums = tl.sum(products * own.to(tl.float32), axis=1)
    tl.store(partial + block.to(tl.int64) * rows + row, sums, mask=has_row)


@triton.jit
def _join(partial, scores, rows, blocks, width, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, blocks):
        total += tl.load(partial + block * rows + row, mask=inside, other=0.0)
    if ROOT:
        # What rounding leaves below zero is clamped; NaN passes.
        total = tl.where(total < 0.0, 0.0, total)
        total = tl.sqrt_rn(tl.div_rn(total, width.to(tl.float32)))
    tl.store(scores + row, total, mask=inside)
