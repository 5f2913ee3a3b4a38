"""FasterVLM."""

import torch
from torch import Tensor

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, register


@register
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

    name = "fastervlm"
    signal = "class attention"
    paper = "arXiv 2412.01818 v1"
    needs = ("cls_attention",)
    fidelity = "golden"

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(tokens.extra("cls_attention"))

    def select(self, rows: Rows) -> Picks:
        return rows.highest()
