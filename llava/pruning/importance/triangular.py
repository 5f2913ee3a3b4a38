"""Products with upper triangular matrices, block by block: little more than half the operations.

A block of rows of U [r, H] is zero left of the diagonal, so it is multiplied with the columns from
there on only. With blocks of b rows a square matrix takes (1 + b / H) / 2 of a full product.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Rows of a block: small on a CPU, where a product fills the machine in any case; on accelerators as
# many as keep them busy.
BLOCK = 256
ACCELERATOR_BLOCK = 1024


def split_parts(x: Tensor, precision: str) -> tuple[Tensor, ...]:
    """Return the left operands of the products for x: float32 or wider, see `product_precision`.

    Returns:
        x itself; x in bfloat16; or for "split" that and what its rounding left over, in bfloat16.
    """
    if precision == "float32":
        return (x,)
    high = x.bfloat16()
    return (high,) if precision == "bf16" else (high, (x - high).bfloat16())


def factor_type(precision: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the triangular matrix for scores in `dtype`."""
    return dtype if precision == "float32" else torch.bfloat16


def quadratic_form(
    g: Tensor, folded: Tensor | Sequence[Tensor], precision: str = "float32"
) -> Tensor:
    """Return g_i^T Q g_i of every row.

    Args:
        g: [N, H], float32 or float64.
        folded: U [H, H], see `fold`, or blocks of its rows, see `folded_rows`, in the type that
            `factor_type` names.
        precision: see `product_precision`.

    Returns:
        [N] in the type of `g`.
    """
    rows: Iterable[Tensor] = folded
    if isinstance(folded, Tensor):
        # On an accelerator one large product is faster than its blocks.
        rows = _rows(folded, BLOCK if g.device.type == "cpu" else len(folded))
    total = g.new_zeros(len(g))
    for start, product in _products(split_parts(g, precision), rows):
        left = g[:, start : start + product.shape[1]]
        total += (product * left).sum(dim=1, dtype=g.dtype)
    return total


def squared_norms(
    parts: tuple[Tensor, ...], factor: Tensor, dtype: torch.dtype, added: Tensor | None = None
) -> Tensor:
    """Return ||R d_ij + v_j||^2 of rows d_ij in the order of i, then j: [n] in `dtype`.

    Args:
        parts: tensors [n, H] that add up to d, see `split_parts`.
        factor: R [r, H], upper triangular, in their type.
        dtype: float32 or float64.
        added: v [l, r] in `dtype`, where n is a multiple of l; None for zero.
    """
    block = BLOCK if factor.device.type == "cpu" else ACCELERATOR_BLOCK
    total = torch.zeros(len(parts[0]), dtype=dtype, device=factor.device)
    for start, product in _products(parts, _rows(factor, block)):
        if added is not None:
            rows, own = product.view(-1, len(added), product.shape[1]), added[:, start:]
            own = own[:, : product.shape[1]]
            # In place where that loses nothing: one pass less for memory.
            product = (rows.add_(own) if rows.dtype == own.dtype else rows + own).flatten(0, 1)
        total += torch.linalg.vector_norm(product, dim=1, dtype=dtype).square_()
    return total


def _rows(factor: Tensor, block: int) -> Iterator[Tensor]:
    """Yield blocks of rows of an upper triangular matrix, each from its diagonal on."""
    for start in range(0, len(factor), block):
        yield factor[start : start + block, start:]


def _products(parts: tuple[Tensor, ...], rows: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, x @ U[start : start + b].T [n, b]) of the sum x of `parts`, block by block."""
    start = 0
    for block in rows:
        yield start, sum_of([multiply(part[:, start:], block.T) for part in parts])
        start += len(block)


def sum_of(products: list[Tensor]) -> Tensor:
    """Add one or two products, in float32 at least if there are two."""
    first, *rest = products
    for product in rest:
        first = first.to(torch.promote_types(first.dtype, torch.float32)).add_(product)
    return first


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix product; of 16-bit operands in float32 where the device can do so."""
    if left.device.type == "cuda" and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def fold(weight1: Tensor, weight2: Tensor) -> Tensor:
    """Return the upper triangular U with g^T U g = g^T Q g for Q = (W2^T W2) o (W1 W1^T).

    Q is symmetric, so elements above the diagonal count twice and those below not at all.

    Args:
        weight1, weight2: W1 [H, Dv] and W2 [D, H], float32 or float64.

    Returns:
        [H, H] in their type.
    """
    width = len(weight1)
    folded = weight1.new_zeros(width, width)
    for start in range(0, width, ACCELERATOR_BLOCK):
        block = slice(start, start + ACCELERATOR_BLOCK)
        rows = weight2[:, block].T @ weight2[:, start:]
        rows *= weight1[block] @ weight1[start:].T
        rows = rows.triu_().mul_(2)
        rows.diagonal().mul_(0.5)
        folded[block, start:] = rows
    return folded


def folded_rows(weights1: Sequence[Tensor], weight2: Tensor, block: int) -> Iterator[list[Tensor]]:
    """Yield `fold` of every W1 with one W2, in blocks of rows from their diagonals on.

    Args:
        weights1: G tensors W1 [H, Dv].
        weight2: W2 [D, H] in their type.
        block: b, rows of a block.

    Yields:
        For every block the rows [b, H - start] of the G matrices. Together they have little more
        than half of the numbers of G matrices [H, H], and W2^T W2 is made once for all of them.
    """
    for start in range(0, weight2.shape[1], block):
        inner = weight2[:, start : start + block].T @ weight2[:, start:]
        made = []
        for weight1 in weights1:
            rows = weight1[start : start + block] @ weight1[start:].T
            rows = rows.mul_(inner).triu_().mul_(2)
            rows.diagonal().mul_(0.5)
            made.append(rows)
        yield made


def triangular_factor(weight: Tensor) -> Tensor:
    """Return upper triangular R with ||R d|| = ||W d|| for every d: W = QR, Q orthonormal.

    Args:
        weight: W [D, H], float32 or float64.

    Returns:
        [min(D, H), H] in its type: never more operations than W.
    """
    # Other accelerators do not have this decomposition. It is made once.
    work = weight if weight.device.type in ("cuda", "meta") else weight.cpu()
    return torch.linalg.qr(work, mode="r").R.to(weight.device)
