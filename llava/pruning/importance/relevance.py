"""How much a token has to do with the instruction."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.precision import outside_autocast


@outside_autocast()
def text_relevance(image: Tensor, text: Tensor) -> Tensor:
    """Mean over the segments of a text of cos(token, segment) (CDPruner, arXiv 2506.10967).

    Args:
        image: [N, E] tokens of one tile in the space that images and texts share.
        text: [m, E] embeddings of the m segments.

    Returns [N] in float32 (float64 for float64). With CLIP, patches that show what the text speaks
    of have the *lower* cosines.
    """
    wide = torch.promote_types(image.dtype, torch.float32)
    unit = [
        x.to(wide) / x.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (image, text)
    ]
    return (unit[0] @ unit[1].to(image.device).T).mean(dim=-1)


def spread_out(scores: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """(q - min + 1e-6) / (max - min), with min and max over all valid tokens of a group of rows.

    Args:
        scores: [T, N].
        groups: LongTensor [T], rows with the same number are normalised together.
        valid: BoolTensor [T, N]; invalid tokens do not count and become 0.

    Returns [T, N]; 1 everywhere in a group whose scores are all the same. Raises PruningError for
    NaN.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    out = torch.zeros_like(scores)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().flatten().to(scores.device)
        own, inside = scores[rows], valid[rows]
        lowest = own.masked_fill(~inside, torch.inf).amin()
        highest = own.masked_fill(~inside, -torch.inf).amax()
        if not bool((highest - lowest).isfinite()):
            raise PruningError("the relevance of a token is NaN or inf")
        spread = (own - lowest + 1e-6) / (highest - lowest)
        out[rows] = torch.where(highest > lowest, spread, 1.0).masked_fill(~inside, 0)
    return out
