"""Projector sensitivity: how strongly a visual token moves when it is nudged before the projector.

ZOO-Prune, arXiv 2509.24837, eq. 2-4: S(i) = 1/m sum_j ||M(x_i + h u_j) - M(x_i - h u_j)||_2 / 2h.

"exact" has a closed form for linear and Linear-activation-Linear projectors, with or without a norm
of the patches that are joined before them. Others are differentiated in forward mode (by central
differences where a layer does not support it), along all Dv axes if Dv <= 256, beyond that along
the directions, an unbiased estimate of the square.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.importance import normed
from llava.pruning.importance import two_layer as closed_forms
from llava.pruning.importance.black_box import as_released, black_box, forward_mode
from llava.pruning.importance.derivatives import elementwise
from llava.pruning.importance.offloaded import at_hand
from llava.pruning.importance.projectors import (
    NormedMerger,
    TwoLayer,
    linear_matrix,
    normed_merger,
    two_layer,
    weights_of,
)
from llava.pruning.kernels import usable
from llava.pruning.precision import COMPUTE, outside_autocast, product_precision
from llava.registry import unknown

ESTIMATORS = ("zeroth_order", "exact")
PRECISIONS = ("float32", "model")
# What the intermediates of a score may take. An accelerator needs few and large steps to be busy;
# what it may take there is less than the unpruned prefill needs for one image (378 MiB beyond the
# weights of LLaVA-1.5-7B).
CHUNK_BYTES = 64 * 2**20
ACCELERATOR_CHUNK_BYTES = 240 * 2**20

Function = Callable[[Tensor], Tensor]


@outside_autocast()
def sensitivity(
    projector: nn.Module,
    features: Tensor,
    *,
    estimator: str = "zeroth_order",
    directions: int | Tensor = 64,
    step: float = 0.01,
    seed: int = 0,
    precision: str = "float32",
    compute: str = "auto",
    hidden: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Measure the sensitivity of every token.

    Args:
        projector: any module that maps tokens [n, Dv] to [n, D], each by itself.
        features: [..., N, Dv] tokens before the projector.
        estimator: "zeroth_order", the paper's mean of central-difference norms; or "exact",
            ||J||_F / sqrt(Dv): the root mean square of the same quantity over all directions, so
            never below the paper's mean (Jensen) and free of step, seed and noise.
        directions: how many directions to draw, or the directions themselves, [m, Dv].
        step: h. Directions have unit norm, so h is the length of the nudge.
        seed: of the drawn directions.
        precision: "float32", or "model": all of it in the features' own type and as many passes
            through the projector as ZOO-Prune's released code makes; the result is of that type.
        compute: precision of the largest products on projectors with a closed form, see
            `product_precision`.
        hidden: of Linear-activation-Linear projectors the pre-activations W1 x + b1, [..., N, H],
            where these are known; tensors [N, H] in a list for features [T, N, Dv]. None: computed
            here, where they are used.

    Nudges, differences, derivatives and sums are float32 at least: in half precision most of the
    nudge is rounded away, and noise that grows with the token is added. Every [N, Dv] row of the
    leading shape is scored by itself, so the same features and pre-activations have the same scores
    bit for bit alone and in a batch.

    Returns:
        [..., N] in float32 (float64 if `features` are float64).

    Raises:
        PruningError: an argument is wrong.
    """
    _check_arguments(projector, features, estimator, step, precision, compute)
    projector = at_hand(projector, features.device)
    dtype = features.dtype
    if precision == "float32":
        dtype = torch.promote_types(dtype, torch.float32)
    products = product_precision(compute, features.dtype, features.device)
    # Forward-mode derivatives and version counters do not exist in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        bank = _bank(directions, seed, features, dtype)
        tiles = [*features.detach().reshape(-1, *features.shape[-2:])]
        parts = two_layer(projector)
        if precision == "model":
            score = as_released(projector, bank, step, dtype, _chunk_bytes(bank.device))
        elif parts is not None:
            _check_width(parts.first.in_features, bank)
            if hidden is not None:
                hidden = _hidden_tiles(hidden, len(tiles), features.shape[-2], parts)
            fast = estimator == "exact" and products == "bf16" and dtype == torch.float32
            kind = _kernel_for(parts.act) if fast and usable(features) else None
            if kind is not None:
                scores = _scores_by_kernels(projector, parts, tiles, hidden, kind)
                return scores.reshape(features.shape[:-1])
            score = _closed_form(projector, parts, estimator, bank, step, products)
            if hidden is not None:
                tiles = hidden
            else:
                score = _after_first_layer(score, parts)
        else:
            merger = normed_merger(projector)
            if merger is None:
                score = _scorer(projector, estimator, bank, step, dtype)
            else:
                _check_merger(merger, bank, hidden)
                score = _normed_form(projector, merger, estimator, bank, step, products)
        # copy: a fresh, aligned block of memory whatever the batch around the row looks like.
        whole = torch.contiguous_format
        rows = [score(tile.to(dtype, copy=True, memory_format=whole)) for tile in tiles]
        if not rows:
            return features.new_zeros(features.shape[:-1], dtype=dtype)
        return torch.stack(rows).reshape(features.shape[:-1])


def _check_arguments(
    projector: nn.Module,
    features: Tensor,
    estimator: str,
    step: float,
    precision: str,
    compute: str,
) -> None:
    if estimator not in ESTIMATORS:
        raise PruningError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if not isinstance(projector, nn.Module):
        raise PruningError(f"projector must be a module, got {projector!r}")
    if features.dim() < 2:
        raise PruningError(f"features must be [..., N, Dv], got {list(features.shape)}")
    if not step > 0:
        raise PruningError(f"step must be positive, got {step}")
    if precision not in PRECISIONS:
        raise PruningError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "model" and estimator != "zeroth_order":
        raise PruningError("precision='model' is a way to nudge tokens: use 'zeroth_order'")
    if compute not in COMPUTE:
        raise PruningError(unknown("compute", compute, COMPUTE))


@lru_cache(maxsize=16)
def direction_bank(seed: int, width: int, count: int) -> Tensor:
    """Draw unit-norm Gaussian rows [count, width] (ZOO-Prune eq. 2), float32, CPU. Read only.

    A pure function of its arguments: drawn from a private generator, always on the CPU and in
    float32, so that neither call order nor device nor dtype changes the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        bank = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
        return bank / bank.norm(dim=1, keepdim=True).clamp_min(1e-12)


@lru_cache(maxsize=16)
def _bank_on(device: torch.device, dtype: torch.dtype, seed: int, width: int, count: int) -> Tensor:
    """Return the bank on an accelerator, copied there once: a copy makes the host wait."""
    with torch.inference_mode(False):
        return direction_bank(seed, width, count).to(device, dtype)


def _bank(directions: int | Tensor, seed: int, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the directions as [m, Dv] in `dtype`, where the features are."""
    width, device = features.shape[-1], features.device
    if isinstance(directions, Tensor):
        if directions.dim() != 2 or directions.shape[1] != width or len(directions) == 0:
            raise PruningError(f"directions must be [m, {width}], got {list(directions.shape)}")
        return directions.to(device, dtype)
    if directions < 1:
        raise PruningError(f"directions must be at least 1, got {directions}")
    if device.type == "cpu":
        return direction_bank(seed, width, directions).to(dtype)
    return _bank_on(device, dtype, seed, width, directions)


def _check_width(width: int, bank: Tensor) -> None:
    if width != bank.shape[1]:
        raise PruningError(
            f"the projector takes tokens of width {width}, features have {bank.shape[1]}; give the "
            "features that this projector is fed with"
        )


def _hidden_tiles(
    hidden: Tensor | Sequence[Tensor], count: int, tokens: int, parts: TwoLayer
) -> list[Tensor]:
    """Return the pre-activations of every tile, [N, H] each."""
    width = parts.first.out_features
    stacks = [hidden] if isinstance(hidden, Tensor) else hidden
    tiles = [tile for s in stacks for tile in s.detach().reshape(-1, *s.shape[-2:])]
    if len(tiles) != count or any(tile.shape != (tokens, width) for tile in tiles):
        raise PruningError(
            f"hidden must be the pre-activations of the features' {count} tiles, "
            f"[{tokens}, {width}] each, got {[list(tile.shape) for tile in tiles]}"
        )
    return tiles


# --- Linear-activation-Linear ---------------------------------------------------------------------


def _closed_form(
    projector: nn.Module,
    parts: TwoLayer,
    estimator: str,
    bank: Tensor,
    step: float,
    products: str,
) -> Function:
    """Return how pre-activations [N, H] of a Linear-activation-Linear projector are scored."""
    owner = weights_of(projector)
    if estimator == "exact":
        return lambda hidden: closed_forms.exact(owner, parts, hidden, products)
    return closed_forms.zeroth_order(owner, parts, bank, step, products, _chunk_bytes(bank.device))


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def _kernel_for(act: nn.Module) -> str | None:
    """Return what kernels call the derivative of an activation; None if they have none."""
    from llava.pruning.kernels.quadratic import derivative_kind

    known = elementwise(act)
    return None if known is None else derivative_kind(known)


def _scores_by_kernels(
    projector: nn.Module,
    parts: TwoLayer,
    tiles: Sequence[Tensor],
    hidden: Sequence[Tensor] | None,
    kind: str,
) -> Tensor:
    """Return the exact scores of all tiles [T * N]; their first layer runs tile by tile."""
    if hidden is None:
        hidden = [closed_forms.pre_activations(parts, tile) for tile in tiles]
    rows = hidden[0] if len(hidden) == 1 else torch.cat([*hidden])
    return closed_forms.exact_by_kernels(weights_of(projector), parts, rows, kind)


def _after_first_layer(score: Function, parts: TwoLayer) -> Function:
    return lambda x: score(closed_forms.pre_activations(parts, x))


# --- norm, join, Linear-activation-Linear ---------------------------------------------------------


def _check_merger(merger: NormedMerger, bank: Tensor, hidden: object) -> None:
    _check_width(merger.mlp.first.in_features, bank)
    if hidden is not None:
        raise PruningError(
            "hidden is taken for Linear-activation-Linear projectors only, this one has a norm "
            "before them: leave it out"
        )


def _normed_form(
    projector: nn.Module,
    merger: NormedMerger,
    estimator: str,
    bank: Tensor,
    step: float,
    products: str,
) -> Function:
    """Return how tokens [N, G * C] of a normed merger are scored."""
    owner = weights_of(projector)
    layers = normed.in_type(merger, bank.dtype)
    chunk_bytes = _chunk_bytes(bank.device)
    if estimator == "exact":
        return lambda x: normed.exact(owner, layers, x, products, chunk_bytes)
    return lambda x: normed.zeroth_order(owner, layers, x, bank, step, products, chunk_bytes)


# --- any other projector --------------------------------------------------------------------------


def _scorer(
    projector: nn.Module, estimator: str, bank: Tensor, step: float, dtype: torch.dtype
) -> Function:
    """Return how tokens [N, Dv] of a projector of another form are scored."""
    matrix = linear_matrix(projector, dtype)
    if matrix is not None:
        _check_width(matrix.shape[1], bank)
        norms = (bank @ matrix.T).norm(dim=1)
        root = matrix.norm() / matrix.shape[1] ** 0.5
        constant = norms.mean() if estimator == "zeroth_order" else root
        return lambda x: constant.expand(x.shape[0])
    if estimator == "zeroth_order":
        return black_box(projector, bank, step, dtype, _chunk_bytes(bank.device))
    return forward_mode(projector, bank, step, dtype, _chunk_bytes(bank.device))
