"""AgilePruner."""

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, Rows, VisualTokens, option, register
from llava.pruning.precision import widen
from llava.pruning.selection.max_min import cosine


@register
class AgilePruner(PruningMethod):
    """Keep what the class token attends to, less and less of what resembles it.

    Paper: "AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token
    Pruning in LVLMs", ICLR 2026, arXiv 2603.01236.

        erank   exp(-sum p ln p), p = singular values of the features, divided by their sum
        tau_o   min(tau_max, slope * o * erank / erank_avg)
        walk    tokens by descending class attention, o = 1, 2, ...: if the o-th is still there,
                keep it and remove all at a cosine distance below tau_o, until k are kept

    The more complex the image (a high erank), the more diverse the choice.

    Reconstructed from the project page and a third party's code, as the authors' is not public.
    Open: erank_avg, the average over a calibration set, and tau_max are not published; 16 and 0.95
    are that third party's for another model, as is centring the features before the singular
    values. That candidates which run out are filled up in order of attention is not confirmed.

    Options: slope, erank_avg, tau_max, centre. Margins are not recorded.
    """

    name = "agilepruner"
    signal = "class attention, distance threshold by effective rank"
    paper = "ICLR 2026, arXiv 2603.01236"
    needs = ("features", "cls_attention")
    fidelity = "reconstructed"

    slope: float = option(0.01, at_least=0)
    erank_avg: float = option(16.0, above=0)
    tau_max: float = option(0.95, at_least=0, at_most=2)
    centre: bool = option(True)

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.stack(tokens.extra("cls_attention"))

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        order = tokens[rows.scored[row, tokens].argsort(descending=True, stable=True)]
        return order[self._walk(rows.tokens.features[row, order], count)]

    def _walk(self, x: Tensor, count: int) -> Tensor:
        """Return which of x [n, C], ordered by attention, are kept: LongTensor [count]."""
        x = widen(x)
        rise = self.slope * effective_rank(x, centre=self.centre) / self.erank_avg
        distance = (1 - cosine(x)).cpu()
        here = torch.ones(len(x), dtype=torch.bool)
        kept: list[int] = []
        for place in range(len(x)):
            if len(kept) == count:
                break
            if here[place]:
                kept.append(place)
                here &= distance[place] >= min(self.tau_max, (place + 1) * rise)
        refilled = list(dict.fromkeys([*kept, *range(len(x))]))
        return torch.tensor(refilled[:count], dtype=torch.long, device=x.device)


def effective_rank(x: Tensor, *, centre: bool) -> float:
    """Return exp of the entropy of x's [n, C] singular values by their sum; 1 for equal rows."""
    x = x.double()
    if centre:
        x = x - x.mean(dim=0)
    # Eigenvalues of the smaller Gram matrix: the squares of the singular values.
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    # On a GPU NaN is refused later, and the solver does not take it.
    values = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    return float(torch.exp(torch.special.entr(share).sum()))
