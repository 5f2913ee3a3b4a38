"""VisPruner."""

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, Rows, VisualTokens, option, register
from llava.pruning.precision import widen
from llava.pruning.selection.max_min import cosine

# Duplicates that leave in one round.
ROUND = 8


@register
class VisPruner(PruningMethod):
    """Keep what the class token attends to, and of the rest what has no double.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
    VLMs", ICCV 2025, arXiv 2412.01818 v2.

        important   the floor(r k) patches with the highest class attention
        residual    all others, by descending attention; until k tokens are left in all:
                    a = its 1st, 3rd, ... entry, b = its 2nd, 4th, ...
                    drop the 8 of a (or as many as are too many) most similar to any of b,
                    residual = the others of a by descending similarity, then b

    r = 1 is FasterVLM. Where the released code differs: it stops with an error when the residual
    has an odd length (k = 58, for one) or a batch has more than one image, and works in half
    precision; here neither, and no option brings the error back. The order of all similarities
    decides who meets whom in the next round, so one near-tie changes all that follows: equal to
    recorded runs in float64, while the released code itself, in float32 or half precision against
    float64, may have only some 50 of 64 tokens in common. On LLaVA-1.6 it keeps k of each of five
    tiles, `mm_next_protocol="fixed2880"` here.

    Option: important_ratio r. Margins are not recorded: a choice is the end of many rounds.
    """

    name = "vispruner"
    signal = "class attention, duplicates removed"
    paper = "ICCV 2025, arXiv 2412.01818 v2"
    needs = ("features", "cls_attention")
    fidelity = "golden"

    important_ratio: float = option(0.5, at_least=0, at_most=1)

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(tokens.extra("cls_attention"))

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        order = tokens[rows.scored[row, tokens].argsort(descending=True, stable=True)]
        important = int(count * self.important_ratio)
        first, rest = order[:important], order[important:]
        similarity = cosine(widen(rows.tokens.features[row, rest]))
        return torch.cat([first, rest[drop_duplicates(similarity, count - important)]])


def drop_duplicates(similarity: Tensor, count: int) -> Tensor:
    """Return which of n tokens stay, in the order the rounds leave them in: LongTensor [count].

    Args:
        similarity: [n, n] of tokens in the order of the first round.
        count: how many stay.
    """
    residual = torch.arange(len(similarity), device=similarity.device)
    if count == 0:
        return residual[:0]
    while len(residual) > count:
        a, b = residual[0::2], residual[1::2]
        nearest = similarity.index_select(0, a).index_select(1, b).amax(dim=1)
        order = nearest.argsort(descending=True, stable=True)
        drop = min(ROUND, len(residual) - count, len(a))
        residual = torch.cat([a[order[drop:]], b])
    return residual
