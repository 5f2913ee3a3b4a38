"""FasterVLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod
from llava.pruning.registry import register
from llava.pruning.selection.rows import Picks
from llava.pruning.selection.topk import top_k
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class FasterVLM(PruningMethod):
    """Keep the k patches that the class token attends to most.

    Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
    Inference Faster", arXiv 2412.01818 v1.

        s_j = mean over heads of A[class, j], in the block that makes the features
        keep the k highest s, in raster order

    The published budgets are 144, 58 and 29 of 576. On LLaVA-1.6 the released code keeps k of every
    tile, without unpadding and newlines, on the canvas that the image fills best:
    `mm_next_protocol="spatial-filled"` with 5 k here, or `"spatial"` on LLaVA's choice of canvas.
    """

    name: ClassVar[str] = "fastervlm"
    signal: ClassVar[str] = "class attention"
    paper: ClassVar[str] = "arXiv 2412.01818 v1"
    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    fidelity: ClassVar[str] = "golden"

    def importance(self, visual: VisualTokens) -> Tensor:
        return torch.stack(visual.extra("cls_attention"))

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        assert importance is not None
        return top_k(importance, counts, valid=visual.valid)
