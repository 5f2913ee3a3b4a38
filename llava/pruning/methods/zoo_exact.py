"""ZOO-Prune with exact derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.importance.projectors import low_rank
from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.method import SimilarityMethod, check_whole
from llava.pruning.registry import register
from llava.pruning.selection.fusion import check_fusion, fuse
from llava.pruning.selection.rows import Picks
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class ZooExact(SimilarityMethod):
    """ZOO-Prune's idea without its estimate: S(i) = ||J(x_i)||_F / sqrt(Dv) in closed form.

    J is the projector's Jacobian; the paper's S estimates E_u ||J u||, this is the root mean square
    of the same ||J u||. No directions, no step, no seed, and one matrix product per token in the
    place of 2 m projector passes. Everything after the score is as in `zoo`.

    Options: fusion and projector_rank as in `zoo`.
    """

    name: ClassVar[str] = "zoo-exact"
    signal: ClassVar[str] = "exact projector sensitivity x max-min cosine distance"
    paper: ClassVar[str] = "this project, after arXiv 2509.24837"
    needs: ClassVar[tuple[str, ...]] = ("features", "projector")
    fidelity: ClassVar[str] = "vectors"

    fusion: str = "multiply"
    projector_rank: int | None = None

    def __post_init__(self) -> None:
        check_fusion(self.fusion)
        if self.projector_rank is not None:
            check_whole("projector_rank", self.projector_rank, at_least=1)

    @property
    def compares(self) -> bool:
        return self.fusion != "sensitivity"

    def importance(self, visual: VisualTokens) -> Tensor:
        projector = visual.projector
        if self.projector_rank is not None:
            projector = low_rank(projector, self.projector_rank)
        return sensitivity(projector, visual.features, estimator="exact")

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
        return fuse(z, importance, counts, valid=valid, factor=factor, fusion=self.fusion)
