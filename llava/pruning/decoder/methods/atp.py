"""ATP-LLaVA, inference alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from llava.pruning.decoder.atp_heads import ThresholdHeads, read_heads
from llava.pruning.decoder.layers import take_columns
from llava.pruning.decoder.method import DecoderMethod, Schedule, Stage, option, register
from llava.pruning.decoder.schedule import check_layers
from llava.pruning.errors import PruningError
from llava.pruning.importance.normalise import min_max
from llava.pruning.indices import constant, raster_slots
from llava.utils import user_path


@register
class ATP(DecoderMethod):
    """Keep as many tokens as trained thresholds say, in a few layers.

    Paper: "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", CVPR 2025,
    arXiv 2412.00447. No code and no heads were released; this follows descriptions of it.

        s_self,j  = mean over heads and visual i >= j of q_i k_j / sqrt(d)   (before the softmax)
        s_cross,j = mean over heads and the text behind the image of A[t, j]
        s_red     = (s_self + s_cross) / 2
        s_spat,j  = 1 - 3 R_s where row and column of j are multiples of the stride, R_s = 1 /
                    stride^2; 0 elsewhere
        theta_r, theta_s = sigmoid(linear(projection([s_red, s_spat])))
        before layer l keep j if s_red,j > theta_r or s_spat,j > theta_s; positions stay

    Attention is that of layer l - 1. Logits are averaged over the queries that may see j; what is
    received counts, which descriptions leave open. Both parts of s_red are min-max normalised over
    the tokens of an image, as their scales differ; `normalise=false` leaves that out. The heads
    read scores by place in the unpruned image, 0 where a token is gone. Where none is above a
    threshold, the one with the highest s_red stays.

    Thresholds decide how many tokens stay, so there is no budget. Images must be one square grid
    of as many tokens as the heads were trained for.

    Options: heads, a file in the format of `llava.pruning.decoder.atp_heads.read_heads`; strides,
    one for all modules or one each; sampled, the factor 3; normalise.
    """

    name = "atp"
    signal = "attention in the layer, a grid; trained thresholds"
    paper = "arXiv 2412.00447, CVPR 2025"
    fidelity = "reconstructed"
    fixed_count = False

    heads: str | None = option(None)
    strides: tuple[int, ...] = option((2,), at_least=1)
    sampled: float = option(3.0, at_least=0)
    normalise: bool = option(True)

    def __post_init__(self) -> None:
        if not isinstance(self.heads, str):
            raise PruningError(
                "atp needs heads=FILE with trained thresholds; they are trained together with the "
                "language model, and the authors released none"
            )
        super().__post_init__()
        if len(self.strides) not in (1, len(self._modules)):
            raise PruningError(
                f"strides must be one, or one for each of the {len(self._modules)} modules of "
                f"{self.heads}, got {[*self.strides]}"
            )

    @cached_property
    def _modules(self) -> dict[int, ThresholdHeads]:
        return read_heads(user_path(str(self.heads)))

    @property
    def files(self) -> tuple[str, ...]:
        return (str(self.heads),)

    def check_budget(self, given: bool) -> None:
        if given:
            raise PruningError("atp has no budget: its thresholds decide how many tokens stay")

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        return Schedule(check_layers(tuple(self._modules), depth), None)

    def score(self, stage: Stage) -> Tensor:
        parts = received_logits(stage), attention_of_text(stage)
        if self.normalise:
            parts = min_max(parts[0], stage.present), min_max(parts[1], stage.present)
        return (parts[0] + parts[1]) / 2

    def select(self, stage: Stage, scores: Tensor, counts: Sequence[int]) -> Tensor:
        module = [*self._modules].index(stage.layer)
        heads = self._modules[stage.layer]
        sides = [_side(stage, image, heads.tokens) for image in range(len(stage.images))]
        stride = self.strides[module if len(self.strides) > 1 else 0]
        side = constant(tuple(sides), scores.device)[:, None]
        on_grid = (stage.place // side % stride == 0) & (stage.place % side % stride == 0)
        spatial = on_grid * scores.new_tensor(1 - self.sampled / stride**2)
        seen = scores.new_zeros(2, len(scores), heads.tokens)
        for part, values in zip(seen, (scores, spatial), strict=True):
            part.scatter_add_(1, stage.place, values.masked_fill(~stage.present, 0))
        redundant, sampled = heads.thresholds(torch.cat([seen[0], seen[1]], dim=1))
        kept = (scores > redundant) | (spatial > sampled)
        best = scores.masked_fill(~stage.present, -torch.inf).argmax(dim=1, keepdim=True)
        none_kept = ~(kept & stage.present).any(dim=1, keepdim=True)
        kept = kept.scatter(1, best, kept.gather(1, best) | none_kept)
        return raster_slots(kept & stage.present)


def _side(stage: Stage, number: int, tokens: int) -> int:
    """Return the rows of an image's grid.

    Raises:
        PruningError: it is no square, or of another size than the heads know.
    """
    image = stage.images[number]
    side = math.isqrt(image.total)
    one_tile = image.layout is None or (image.layout.tiles == 1 and not image.layout.newline)
    if image.total != tokens or side * side != tokens or not one_tile:
        raise PruningError(
            f"the heads of atp are for images of {tokens} tokens in a square, and an image has "
            f"{image.total}; use heads for this model, or images of one tile"
        )
    return side


def received_logits(stage: Stage) -> Tensor:
    """Return the mean logit that a visual token gets of visual tokens from it on: [I, N].

    The mean over i >= j of q_i k_j is the product of k_j with the mean of these q_i, so no matrix
    of N x N is made.
    """
    decoder, layer, hidden = stage.decoder, stage.layer, stage.hidden
    kind = torch.promote_types(hidden.dtype, torch.float32)
    own = [
        take_columns(part(layer, hidden, stage.rotary).transpose(1, 2)[stage.rows], stage.columns)
        for part in (decoder.queries, decoder.keys)
    ]
    queries, keys = (part.to(kind) for part in own)
    queries = queries.masked_fill(~stage.present[..., None, None], 0)
    following = queries.flip(1).cumsum(dim=1).flip(1)
    number = stage.present.flip(1).cumsum(dim=1).flip(1).clamp(min=1)
    logits = (following * keys).sum(dim=3).mean(dim=2) / number
    return logits * decoder.scaling(layer)


def attention_of_text(stage: Stage) -> Tensor:
    """Return the mean attention of the text behind an image to its tokens: [I, N].

    0 for an image without text behind it.
    """
    width = int(stage.text.sum(dim=1).max())
    queries = stage.text.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    is_text = stage.text.gather(1, queries)
    queries = queries.where(is_text, stage.last[:, None])  # padding attends to nothing
    last = stage.columns.masked_fill(~stage.present, -1).amax(dim=1, keepdim=True)
    counts = is_text[stage.rows] & (queries[stage.rows] > last)
    attention = stage.attention(queries).mean(dim=1)[stage.rows]
    at = stage.columns[:, None].expand(-1, width, -1)
    weights = counts.to(attention.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return (attention.gather(2, at) * weights[..., None]).sum(dim=1)
