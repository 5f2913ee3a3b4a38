"""Normalise scores, and tokens before they are compared, over the valid tokens of every row."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.indices import constant
from llava.pruning.kernels import usable
from llava.pruning.late_checks import refuse_if
from llava.pruning.precision import widen
from llava.pruning.selection.rows import selectable

# Below this relative spread a score only carries rounding noise.
FLAT = 1e-4


def min_max(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return (S - min) / (max - min + 1e-8) over the valid tokens of every row (ZOO-Prune eq. 5).

    Rows where max - min <= 1e-4 * mean are constant up to rounding (a linear projector has the
    same Jacobian everywhere): their weights are all 1, so that noise decides nothing.

    Args:
        scores: [..., N] floating point.
        valid: BoolTensor [..., N]; invalid tokens do not count and get weight 0.

    Returns:
        [..., N] in [0, 1].
    """
    if scores.shape[-1] == 0:
        return scores
    if scores.dtype == torch.float32 and scores.dim() == 2 and usable(scores, scores.shape[1]):
        from llava.pruning.kernels import normalise

        return normalise.min_max(scores, valid, FLAT)
    low = high = own = scores
    count: int | Tensor = scores.shape[-1]
    if valid is not None:
        low, high = (scores.masked_fill(~valid, fill) for fill in (torch.inf, -torch.inf))
        own, count = scores.masked_fill(~valid, 0), valid.sum(dim=-1, keepdim=True)
    lowest, highest = low.amin(dim=-1, keepdim=True), high.amax(dim=-1, keepdim=True)
    # The sum may be beyond float16.
    mean = widen(own).sum(dim=-1, keepdim=True) / count
    spread = highest - lowest
    weights = (scores - lowest) / (spread + 1e-8)
    weights = torch.where(spread <= FLAT * mean.abs(), 1.0, weights)
    return weights if valid is None else weights.masked_fill(~valid, 0)


def spread_out(scores: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return (q - min + 1e-6) / (max - min), over all valid tokens of a group of rows (CDPruner).

    Args:
        scores: [T, N].
        groups: LongTensor [T] on the CPU, rows with the same number are normalised together.
        valid: BoolTensor [T, N]; invalid tokens do not count and become 0.

    Returns:
        [T, N]; 1 everywhere in a group whose scores are all the same.

    Raises:
        PruningError: a score is NaN or inf.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    out = torch.zeros_like(scores)
    for group in groups.unique().tolist():
        rows = constant(tuple((groups == group).nonzero()[:, 0].tolist()), scores.device)
        own, inside = scores[rows], valid[rows]
        lowest = own.masked_fill(~inside, torch.inf).amin()
        highest = own.masked_fill(~inside, -torch.inf).amax()
        refuse_if(scores.device, partial(_not_finite, highest - lowest), _no_relevance)
        spread = (own - lowest + 1e-6) / (highest - lowest)
        out[rows] = torch.where(highest > lowest, spread, 1.0).masked_fill(~inside, 0)
    return out


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _no_relevance() -> PruningError:
    return PruningError("the relevance of a token is NaN or inf")


def sigmoid_of_z_score(
    scores: Tensor, valid: Tensor | None = None, room: list[int] | None = None
) -> Tensor:
    """Return sigmoid((s - mean) / std) of scores [B, N] over a row's valid tokens.

    1/2 everywhere in a row of equal scores; invalid tokens get 0. For `room` see `map_rows`.
    """

    def of_row(own: Tensor) -> Tensor:
        return ((own - own.mean()) / own.std(correction=0).clamp_min(1e-6)).sigmoid()

    return map_rows(of_row, scores, valid, room)


def centre(z: Tensor, valid: Tensor | None = None, room: list[int] | None = None) -> Tensor:
    """Return z_i - mean_j z_j over the valid tokens of every row (Cen-Prune, arXiv 2608.30263).

    Args:
        z: [B, N, C]; half precision is computed in float32.
        valid: BoolTensor [B, N]; invalid tokens do not count and become 0.
        room: see `map_rows`.

    Returns:
        [B, N, C]. A row is the same alone and in a batch.
    """
    return map_rows(lambda own: own - own.mean(dim=0), z, valid, room)


def scale_channels(z: Tensor, valid: Tensor | None = None, room: list[int] | None = None) -> Tensor:
    """Divide every channel of z [B, N, C] by sqrt(var + 1e-6) over a row's valid tokens.

    Half precision is computed in float32; invalid tokens become 0. Where one channel carries nearly
    all variance, all cosines are those of that channel alone (Cen-Prune on Qwen2.5-VL). For `room`
    see `map_rows`.
    """

    def of_row(own: Tensor) -> Tensor:
        return own / (own.var(dim=0, correction=0) + 1e-6).sqrt()

    return map_rows(of_row, z, valid, room)


def map_rows(
    function: Callable[[Tensor], Tensor],
    z: Tensor,
    valid: Tensor | None,
    room: list[int] | None = None,
) -> Tensor:
    """Apply `function` to the valid tokens of every row of z [B, N, ...], in float32 at least.

    `function` maps [n, ...] to [n, ...]. Invalid tokens get 0. `room` says how many tokens of every
    row are valid; without it the host waits to learn that.
    """
    rows = []
    for row in range(z.shape[0]):
        tokens = selectable(z, valid, row, None if room is None else room[row])
        made = function(widen(z[row, tokens]))
        rows.append(made.new_zeros(z.shape[1], *made.shape[1:]).index_copy(0, tokens, made))
    return torch.stack(rows)
