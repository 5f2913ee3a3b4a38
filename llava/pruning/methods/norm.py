"""Token norm as importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import SimilarityMethod
from llava.pruning.registry import register
from llava.pruning.selection.fusion import fuse
from llava.pruning.selection.rows import Picks
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class Norm(SimilarityMethod):
    """||Z_i||_2 in the place of sensitivity, everything else as in `zoo`.

    The cheapest query-blind score there is. Audits found projector sensitivity to rank tokens much
    like their norm on some models, so a method that measures more should beat this row.
    """

    name: ClassVar[str] = "norm"
    signal: ClassVar[str] = "token norm x max-min cosine distance"

    def importance(self, visual: VisualTokens) -> Tensor:
        wide = torch.promote_types(visual.projected.dtype, torch.float32)
        return torch.stack([tile.to(wide).clone().norm(dim=-1) for tile in visual.projected])

    def choose_among(
        self,
        z: Tensor,
        importance: Tensor | None,
        counts: Tensor,
        *,
        valid: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Picks:
        assert importance is not None
        return fuse(z, importance, counts, valid=valid, factor=factor)
