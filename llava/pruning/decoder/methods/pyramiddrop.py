"""PyramidDrop."""

from torch import Tensor

from llava.pruning.decoder.method import (
    DecoderMethod,
    Schedule,
    Stage,
    attention_to_images,
    option,
    register,
)
from llava.pruning.decoder.schedule import at_depth, check_layers, merged_stages, solve
from llava.pruning.errors import PruningError

# Layers of a model with 32, and the share of an image's tokens that is left from each on.
_RECIPES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "released": ((8, 16, 24), (0.5, 0.25, 0.125)),
    "early": ((2, 8, 16), (0.19, 0.19**2, 0.19**3)),
    "mean128": ((2, 10, 20), (0.32, 0.16, 0.08)),
}


@register
class PyramidDrop(DecoderMethod):
    """Drop tokens in three stages, by what the prompt's last token would attend to next.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", CVPR 2025, arXiv 2410.17247.

        s_j = mean over heads of A[last, j], by norm, queries and keys of the layer l to come
        before layer l keep the int(r N) of the N image tokens with the highest s, N as they entered
        positions start again from 0 without gaps

    Recipes (layers and shares r of a model with 32 layers, elsewhere at the same depths):
    `released` (8, 16, 24), (.5, .25, .125), a mean of 270 of 576 tokens; its first layers alone
    make 144. `early` (2, 8, 16), as its authors advise for small budgets. `mean128` (2, 10, 20),
    (.32, .16, .08), a mean of 128. With a budget the shares are lambda, lambda^2, lambda^3 at the
    recipe's layers, lambda solved for the mean.

    Figures that others publish of PyramidDrop "at 64 tokens" do not state layers or shares, so it
    is not known which schedule they are of.

    Options: recipe; layers and ratios in its place, layers being those of the model itself.
    """

    name = "pyramiddrop"
    signal = "attention of the last prompt token in the next layer"
    paper = "arXiv 2410.17247, CVPR 2025"
    fidelity = "golden"
    scored_by = "next"
    positions = "compact"

    recipe: str = option("released", choices=tuple(_RECIPES))
    layers: tuple[int, ...] | None = option(None, at_least=1)
    ratios: tuple[float, ...] | None = option(None, at_least=0, at_most=1)

    def check_budget(self, given: bool) -> None:
        if given and self.ratios is not None:
            raise PruningError("give a budget or ratios, not both: each says how many tokens stay")
        layers = _RECIPES[self.recipe][0] if self.layers is None else self.layers
        ratios = _RECIPES[self.recipe][1] if self.ratios is None else self.ratios
        if len(layers) != len(ratios) and not given:
            raise PruningError(
                f"{len(layers)} layers {[*layers]} need as many ratios, got {[*ratios]}"
            )

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        published, ratios = _RECIPES[self.recipe]
        layers = at_depth(published, depth)
        if self.layers is not None:
            layers = check_layers(self.layers, depth)
        if budget is None:
            ratios = ratios if self.ratios is None else self.ratios
            return merged_stages(layers, [int(tokens * ratio) for ratio in ratios])

        def shrinking(share: float) -> Schedule:
            keep = [int(tokens * share ** (stage + 1)) for stage in range(len(layers))]
            return merged_stages(layers, keep)

        return solve(tokens, depth, budget, shrinking, self.name)

    def score(self, stage: Stage) -> Tensor:
        return attention_to_images(stage)
