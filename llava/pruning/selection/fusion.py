"""How ZOO-Prune joins importance and diversity, and the ablations of that choice."""

from __future__ import annotations

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.normalise import min_max
from llava.pruning.selection.max_min import max_min_with_margins
from llava.pruning.selection.rows import Picks
from llava.pruning.selection.topk import top_k

FUSIONS = ("multiply", "sum", "sensitivity", "diversity")


def fuse(
    z: Tensor,
    importance: Tensor,
    k: Tensor,
    *,
    valid: Tensor | None = None,
    factor: Tensor | None = None,
    fusion: str = "multiply",
    precision: str = "float32",
) -> Picks:
    """Pick k tokens a row by min-max normalised importance and max-min diversity.

    Args:
        z: [B, N, D] projected tokens.
        importance: [B, N] raw importance.
        k: LongTensor [B].
        valid: BoolTensor [B, N] or None.
        factor: [B, N], multiplies the normalised importance (with "diversity" stands in its place).
        fusion: "multiply" (ZOO-Prune eq. 7), "sum" of the two, "sensitivity" (importance alone,
            top-k), "diversity" (importance unused; the same as DivPrune).
        precision: "float32", or "model" to compare tokens in z's own type.
    """
    if fusion == "diversity":
        return max_min_with_margins(
            z, k, weights=factor, valid=valid, first="isolated", precision=precision
        )
    weights = min_max(importance, valid)
    if factor is not None:
        weights = weights * factor
    if fusion == "sensitivity":
        return top_k(weights, k, valid=valid)
    return max_min_with_margins(
        z, k, weights=weights, valid=valid, combine=fusion, precision=precision
    )


def check_fusion(fusion: str) -> None:
    """Raise PruningError unless `fusion` is one of FUSIONS."""
    if fusion not in FUSIONS:
        raise PruningError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
