"""ZOO-Prune with exact derivatives."""

from torch import Tensor

from llava.pruning.importance.offloaded import at_hand
from llava.pruning.importance.projectors import low_rank
from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register, varies
from llava.pruning.selection.max_min import FUSIONS, fuse


@register
class ZooExact(PruningMethod):
    """ZOO-Prune's idea without its estimate: S(i) = ||J(x_i)||_F / sqrt(Dv) in closed form.

    J is the projector's Jacobian; the paper's S estimates E_u ||J u||, this is the root mean square
    of the same ||J u||. No directions, no step, no seed, and one matrix product per token in the
    place of 2 m projector passes. Everything after the score is as in `zoo`.

    Options: fusion and projector_rank as in `zoo`.
    """

    name = "zoo-exact"
    signal = "exact projector sensitivity x max-min cosine distance"
    paper = "this project, after arXiv 2509.24837"
    needs = ("features", "projector")
    wants = ("projector_hidden",)
    fidelity = "vectors"

    fusion: str = option("multiply", choices=FUSIONS)
    projector_rank: int | None = option(None, at_least=1)

    @varies(True)
    def compares(self) -> bool:
        return self.fusion != "sensitivity"

    def score(self, tokens: VisualTokens) -> Tensor:
        projector, hidden = tokens.projector, tokens.extras.get("projector_hidden")
        if self.projector_rank is not None:
            projector = at_hand(projector, tokens.features.device)
            projector, hidden = low_rank(projector, self.projector_rank), None
        return sensitivity(
            projector, tokens.features, estimator="exact", compute=tokens.compute, hidden=hidden
        )

    def select(self, rows: Rows) -> Picks:
        return fuse(rows, self.fusion)
