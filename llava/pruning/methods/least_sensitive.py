"""Control: the tokens a sensitivity method would drop."""

from torch import Tensor

from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, register
from llava.pruning.selection.rows import top_k


@register
class LeastSensitive(PruningMethod):
    """The k tokens of lowest exact sensitivity, to check that sensitivity means anything.

    If a benchmark does not notice the difference to `zoo-exact` with fusion=sensitivity, then it
    does not measure what pruning is about.
    """

    name = "least-sensitive"
    signal = "projector sensitivity, lowest first"
    paper = "control"
    needs = ("features", "projector")
    wants = ("projector_hidden",)
    control = True

    def score(self, tokens: VisualTokens) -> Tensor:
        return sensitivity(
            tokens.projector,
            tokens.features,
            estimator="exact",
            compute=tokens.compute,
            hidden=tokens.extras.get("projector_hidden"),
        )

    def select(self, rows: Rows) -> Picks:
        return top_k(-rows.scored, rows.counts, valid=rows.valid)
