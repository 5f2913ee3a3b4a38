"""ZOO-Prune."""

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.offloaded import at_hand
from llava.pruning.importance.projectors import low_rank, untrained
from llava.pruning.importance.sensitivity import PRECISIONS, sensitivity
from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register, varies
from llava.pruning.selection.max_min import FUSIONS, fuse


@register
class Zoo(PruningMethod):
    """Keep tokens the projector reacts to strongly and that differ from each other.

    Paper: ZOO-Prune, CVPR 2026, arXiv 2509.24837, algorithm 1.

        u_1..u_m    unit-norm Gaussian directions, one bank for all tokens
        S(i)        = 1/m sum_j ||M(x_i + h u_j) - M(x_i - h u_j)||_2 / 2h
        S_hat       = (S - min S) / (max S - min S + 1e-8)
        first pick  argmax_i S_hat(i)
        then        argmax_i S_hat(i) * (1 - max_{j in P} cos(Z_i, Z_j)), until |P| = k

    Where the released code differs: it works in half precision, where rounding takes most of the
    step away and adds noise, and draws directions from the global generator. Here: float32 and a
    private seed; `precision="model"` rounds as released in a float16 model, which keeps 58 to 98 %
    of the same tokens. Two devices do not round alike, so that is as noisy as it was there. Its
    "low-rank" projector for LLaVA-NeXT is cut before the weights are loaded, hence random;
    `projector_rank` (128 there) is the truncated SVD of the trained weights, and with
    `projector_weights="untrained"` a random one of that rank, as released.

    Options: directions m, step h, seed; fusion `multiply` | `sum` | `sensitivity` | `diversity`;
    precision `float32` | `model`; projector_rank, None for the full projector; projector_weights
    `trained` | `untrained`.
    """

    name = "zoo"
    signal = "projector sensitivity x max-min cosine distance"
    paper = "CVPR 2026, arXiv 2509.24837"
    needs = ("features", "projector")
    wants = ("projector_hidden",)
    fidelity = "vectors"

    directions: int = option(64, at_least=1)
    step: float = option(0.01, above=0)
    seed: int = option(0, at_least=0, below=2**64)
    fusion: str = option("multiply", choices=FUSIONS)
    projector_rank: int | None = option(None, at_least=1)
    projector_weights: str = option("trained", choices=("trained", "untrained"))
    precision: str = option("float32", choices=PRECISIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector_weights == "untrained" and self.projector_rank is None:
            raise PruningError("projector_weights='untrained' needs a projector_rank, such as 128")

    @varies(True)
    def compares(self) -> bool:
        return self.fusion != "sensitivity"

    def score(self, tokens: VisualTokens) -> Tensor:
        projector, hidden = tokens.projector, tokens.extras.get("projector_hidden")
        if self.projector_rank is not None:
            projector = at_hand(projector, tokens.features.device)
            hidden = None  # another first layer
        if self.projector_rank is not None and self.projector_weights == "untrained":
            projector = untrained(projector, self.projector_rank, self.seed)
        elif self.projector_rank is not None:
            projector = low_rank(projector, self.projector_rank)
        return sensitivity(
            projector,
            tokens.features,
            directions=self.directions,
            step=self.step,
            seed=self.seed,
            precision=self.precision,
            compute=tokens.compute,
            hidden=hidden,
        )

    def select(self, rows: Rows) -> Picks:
        return fuse(rows, self.fusion, self.precision)
