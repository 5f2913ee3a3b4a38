"""Sensitivity of Linear-activation-Linear projectors in Triton: g = act'(h) and g^T Q g.

The torch code they stand for is `importance.two_layer.exact`, with `importance.derivatives` and
`importance.triangular`: three launches instead of a dozen, and blocks of zeros are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Left operands of the products, see `split_parts`.
PARTS = {"float32": 0, "bf16": 1, "split": 2}


def derivative_kind(act: nn.Module) -> str | None:
    """Return what `activation_derivative` calls the activation; None where it has no formula."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {nn.SiLU: "silu", nn.ReLU: "relu"}.get(type(act))


def activation_derivative(hidden: Tensor, kind: str, centre: Tensor | None = None) -> Tensor:
    """Return act'(hidden) - centre, float32 [R, H].

    Args:
        hidden: pre-activations [R, H], any floating type but float64.
        kind: of `derivative_kind`.
        centre: float32 [H]; None for 0.
    """
    hidden = hidden.contiguous()
    made = torch.empty_like(hidden, dtype=torch.float32)
    if hidden.numel():
        block = 1024
        with torch.cuda.device_of(hidden):  # triton launches on the current GPU
            _derivative[(triton.cdiv(hidden.numel(), block),)](
                hidden,
                centre,
                made,
                hidden.numel(),
                hidden.shape[1],
                KIND=kind,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return made


def quadratic_form(
    g: Tensor,
    folded: Tensor,
    precision: str = "float32",
    *,
    slope: Tensor | None = None,
    constant: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Return g_i^T Q g_i + g_i^T slope + constant of every row: summed in float32, no atomics.

    A row gives the same whatever other rows there are.

    Args:
        g: [R, H] float32.
        folded: U [H, H], upper triangular with g^T U g = g^T Q g, see `triangular.fold`: float32
            for precision "float32", else bfloat16.
        precision: "float32"; "bf16", g is rounded for the products; or "split", what that rounding
            leaves over is multiplied too.
        slope: float32 [H]; None for 0.
        constant: float32 scalar tensor; None for 0.
        width: Dv. With it, the square root of max(that, 0) / Dv.

    Returns:
        [R] float32.
    """
    rows, hidden = g.shape
    scores = torch.empty(rows, dtype=torch.float32, device=g.device)
    if rows == 0:
        return scores
    parts = PARTS[precision]
    tile = tiles(parts)
    if not g.is_cuda:
        # Triton's interpreter cannot multiply bfloat16; float32 holds the same numbers.
        folded = folded.float()
    blocks = triton.cdiv(hidden, tile[1])
    partial = torch.empty(blocks, rows, dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):
        _triangle[(triton.cdiv(rows, tile[0]), blocks)](
            g.contiguous(),
            folded.contiguous(),
            slope,
            partial,
            rows,
            hidden,
            PARTS=parts,
            ROWS=tile[0],
            COLUMNS=tile[1],
            DEPTH=tile[2],
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
        _join[(triton.cdiv(rows, 128),)](
            partial,
            constant,
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


def tiles(parts: int) -> tuple[int, int, int]:
    """Return rows, columns and depth of a program's products.

    Full float32 products have no tensor cores, so their sums lie in more registers.
    """
    return (64, 128, 64) if parts else (64, 64, 32)


@triton.jit
def _derivative(hidden, centre, made, total, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
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
    if centre is not None:
        g -= tl.load(centre + places % width, mask=inside, other=0.0)
    tl.store(made + places, g, mask=inside)


@triton.jit
def _triangle(
    g,
    folded,
    slope,
    partial,
    rows,
    hidden,
    PARTS: tl.constexpr,
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
    for start in range(0, first + COLUMNS, DEPTH):
        at = start + depth
        has_depth = at < hidden
        left = tl.load(lines + at[None, :], mask=has_row[:, None] & has_depth[None, :], other=0.0)
        places = folded + at.to(tl.int64)[:, None] * hidden + column[None, :]
        right = tl.load(places, mask=has_depth[:, None] & has_column[None, :], other=0.0)
        if PARTS == 0:
            products = tl.dot(left, right, products, input_precision="ieee")
        else:
            high = left.to(tl.bfloat16)
            products = tl.dot(high.to(right.dtype), right, products)
            if PARTS == 2:
                low = (left - high.to(tl.float32)).to(tl.bfloat16)
                products = tl.dot(low.to(right.dtype), right, products)
    if slope is not None:
        products += tl.load(slope + column, mask=has_column, other=0.0)[None, :]
    own = tl.load(lines + column[None, :], mask=has_row[:, None] & has_column[None, :], other=0.0)
    sums = tl.sum(products * own, axis=1)
    tl.store(partial + block.to(tl.int64) * rows + row, sums, mask=has_row)


@triton.jit
def _join(partial, constant, scores, rows, blocks, width, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, blocks):
        total += tl.load(partial + block * rows + row, mask=inside, other=0.0)
    if constant is not None:
        total += tl.load(constant)
    if ROOT:
        # What rounding leaves below zero is clamped; NaN passes.
        total = tl.where(total < 0.0, 0.0, total)
        total = tl.sqrt_rn(tl.div_rn(total, width.to(tl.float32)))
    tl.store(scores + row, total, mask=inside)
