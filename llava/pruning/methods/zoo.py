"""ZOO-Prune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.projectors import low_rank, untrained
from llava.pruning.importance.sensitivity import PRECISIONS, sensitivity
from llava.pruning.method import SimilarityMethod, check_choice, check_seed, check_whole
from llava.pruning.registry import register
from llava.pruning.selection.fusion import check_fusion, fuse
from llava.pruning.selection.rows import Picks
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class Zoo(SimilarityMethod):
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

    name: ClassVar[str] = "zoo"
    signal: ClassVar[str] = "projector sensitivity x max-min cosine distance"
    paper: ClassVar[str] = "CVPR 2026, arXiv 2509.24837"
    needs: ClassVar[tuple[str, ...]] = ("features", "projector")
    fidelity: ClassVar[str] = "vectors"

    directions: int = 64
    step: float = 0.01
    seed: int = 0
    fusion: str = "multiply"
    projector_rank: int | None = None
    projector_weights: str = "trained"
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_whole("directions", self.directions, at_least=1)
        check_seed(self.seed)
        check_fusion(self.fusion)
        check_choice("precision", self.precision, PRECISIONS)
        if self.projector_rank is not None:
            check_whole("projector_rank", self.projector_rank, at_least=1)
        if self.projector_weights not in ("trained", "untrained"):
            raise PruningError(
                f"projector_weights is trained or untrained, not {self.projector_weights!r}"
            )
        if self.projector_weights == "untrained" and self.projector_rank is None:
            raise PruningError("projector_weights='untrained' needs a projector_rank, such as 128")
        if not isinstance(self.step, int | float) or not 0 < self.step < math.inf:
            raise PruningError(f"step must be a positive number, got {self.step!r}")

    @property
    def compares(self) -> bool:
        return self.fusion != "sensitivity"

    def importance(self, visual: VisualTokens) -> Tensor:
        projector = visual.projector
        if self.projector_rank is not None and self.projector_weights == "untrained":
            projector = untrained(projector, self.projector_rank, self.seed)
        elif self.projector_rank is not None:
            projector = low_rank(projector, self.projector_rank)
        return sensitivity(
            projector,
            visual.features,
            directions=self.directions,
            step=self.step,
            seed=self.seed,
            precision=self.precision,
        )

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
        return fuse(
            *(z, importance, counts),
            valid=valid,
            factor=factor,
            fusion=self.fusion,
            precision=self.precision,
        )
