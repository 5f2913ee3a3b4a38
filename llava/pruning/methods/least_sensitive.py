"""Control: the tokens a sensitivity method would drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.method import PruningMethod
from llava.pruning.registry import register
from llava.pruning.selection.rows import Picks
from llava.pruning.selection.topk import top_k
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class LeastSensitive(PruningMethod):
    """The k tokens of lowest exact sensitivity, to check that sensitivity means anything.

    If a benchmark does not notice the difference to `zoo-exact` with fusion=sensitivity, then it
    does not measure what pruning is about.
    """

    name: ClassVar[str] = "least-sensitive"
    signal: ClassVar[str] = "projector sensitivity, lowest first"
    paper: ClassVar[str] = "control"
    needs: ClassVar[tuple[str, ...]] = ("features", "projector")
    control: ClassVar[bool] = True

    def importance(self, visual: VisualTokens) -> Tensor:
        return sensitivity(visual.projector, visual.features, estimator="exact")

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        assert importance is not None
        return top_k(-importance, counts, valid=visual.valid)
