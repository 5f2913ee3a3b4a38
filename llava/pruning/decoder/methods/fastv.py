"""FastV."""

from torch import Tensor

from llava.pruning.decoder.columns import PADDING, TEXT, VisualColumns
from llava.pruning.decoder.method import (
    DecoderMethod,
    Schedule,
    Stage,
    attention_to_images,
    option,
    register,
)
from llava.pruning.decoder.schedule import at_depth, merged_stages, solve
from llava.pruning.errors import PruningError


@register
class FastV(DecoderMethod):
    """Drop tokens once, after the second layer, by what the prompt's last token attends to.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764.

        s_j = mean over heads of A[last, j] in layer K - 1 (from 0)
        before layer K keep the round((1 - R) N) tokens with the highest s; positions stay

    The released form with a key cache, which prunes prompts once. K = 2 and R = 0.5 without a
    budget; with one, as many stay as make its mean over layers. The paper speaks of the attention
    of all tokens, the code reads the last one's.

    `span="script"` repeats the released scripts: they take 36 tokens for the text before the image,
    where LLaVA has 35, so the first image token always stays and the first token of text behind the
    image may go.

    Figures that others publish of FastV "at 64 tokens" do not state the layers: those that keep 64
    from layer 2 on have a mean of 96 over 32 layers, not 64.

    Options: k, the layer before which tokens are dropped; ratio R, the share dropped; span.
    """

    name = "fastv"
    signal = "attention of the last prompt token"
    paper = "arXiv 2403.06764, ECCV 2024"
    fidelity = "golden"

    k: int | None = option(None, at_least=1)
    ratio: float | None = option(None, at_least=0, at_most=1)
    span: str = option("image", choices=("image", "script"))

    def check_budget(self, given: bool) -> None:
        if given and self.ratio is not None:
            raise PruningError("give a budget or ratio, not both: each says how many tokens stay")

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        layers = at_depth((2,), depth) if self.k is None else (self.k,)
        if layers[0] >= depth:
            raise PruningError(
                f"k must be less than the {depth} layers of the language model, got {self.k}"
            )
        if budget is None:
            dropped = 0.5 if self.ratio is None else self.ratio
            return merged_stages(layers, (round(tokens * (1 - dropped)),))

        def keeping(share: float) -> Schedule:
            return Schedule(layers, (round(tokens * share),))

        return solve(tokens, depth, budget, keeping, self.name)

    def relabel(self, columns: VisualColumns) -> VisualColumns:
        return columns if self.span == "image" else _moved_by_one(columns)

    def score(self, stage: Stage) -> Tensor:
        return attention_to_images(stage)


def _moved_by_one(columns: VisualColumns) -> VisualColumns:
    """Take the columns one to the right of every image for its own.

    Raises:
        PruningError: no text follows an image.
    """
    image, place = columns.image.clone(), columns.place.clone()
    before = columns.image[:, :-1]
    image[:, 1:] = before.masked_fill(before == PADDING, TEXT)
    image[columns.image == PADDING] = PADDING
    place[:, 1:] = columns.place[:, :-1]
    moved = VisualColumns(image, place, columns.images)
    if moved.counts != columns.counts:
        raise PruningError("span='script' needs text behind every image; use span='image'")
    return moved
