"""Token norm as score."""

import torch
from torch import Tensor

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, register
from llava.pruning.precision import widen
from llava.pruning.selection.max_min import fuse


@register
class Norm(PruningMethod):
    """Score tokens by their L2 norm, ||Z_i||_2, then select as `zoo` does.

    The cheapest query-blind score there is. Audits found projector sensitivity to rank tokens much
    like their norm on some models, so a method that measures more should beat this row.
    """

    name = "norm"
    signal = "token norm x max-min cosine distance"
    compares = True

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack([widen(tile).clone().norm(dim=-1) for tile in tokens.projected])

    def select(self, rows: Rows) -> Picks:
        return fuse(rows)
