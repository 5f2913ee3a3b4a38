"""VisionZip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from llava.pruning.errors import PruningError
from llava.pruning.method import (
    Merged,
    PruningMethod,
    check_choice,
    check_whole,
    stack_merged,
)
from llava.pruning.registry import register
from llava.pruning.selection.topk import top_k
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class VisionZip(PruningMethod):
    """Keep what the class token looks at, and merge the rest into a few contextual tokens.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
    arXiv 2412.04467. Of k tokens c are contextual, k - c dominant:

        dominant    the class token itself, then the k - c - 1 patches it attends to most
        targets     c of the remaining patches, every (n // c)-th of them
        assignment  each other patch to the target whose key is most similar (cosine)
        contextual  x_target + mean of the x assigned to it, then the projector

    c = floor(5 k / 32), as published: 54 + 10 of 64, 108 + 20 of 128, 162 + 30 of 192, 27 + 5 of
    32; below k = 7 there are none, and k = 1 is the class token alone.

    A tower without a class token (SigLIP): the k - c dominant tokens are patches, those with the
    most attention received, as in the released code; the trace says so.

    Options: contextual, c of every tile; ctx_merge `sum` (target plus mean, as the released code
    does) or `mean` (of the target and what was assigned to it, as the paper words it).

    LLaVA-1.6: k of every tile; base view first, then the crops' patches in the order of the canvas,
    their class tokens, their contextual tokens, and no newlines, all as in the released code. That
    code also keeps padding in play, on the checkpoint's own canvas: `mm_next_protocol="spatial"`
    with 5 k here; by default padding is out of reach. Where the released code differs: it compares
    keys in half precision.
    """

    name: ClassVar[str] = "visionzip"
    signal: ClassVar[str] = "class attention, key similarity"
    paper: ClassVar[str] = "CVPR 2025, arXiv 2412.04467"
    needs: ClassVar[tuple[str, ...]] = (
        *("features", "projector"),
        *("cls_attention", "cls_feature", "encoder_keys"),
    )
    merges: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False
    fidelity: ClassVar[str] = "golden"

    contextual: int | None = None
    ctx_merge: str = "sum"

    def __post_init__(self) -> None:
        if self.contextual is not None:
            check_whole("contextual", self.contextual, at_least=0)
        check_choice("ctx_merge", self.ctx_merge, ("sum", "mean"))

    def merge(self, visual: VisualTokens, counts: Tensor) -> Merged:
        attention = torch.stack(visual.extra("cls_attention"))
        few = torch.tensor([self._split(k) for k in counts.tolist()], dtype=torch.long)
        patches = counts - few - int(visual.class_token)
        dominant = top_k(attention, patches, valid=visual.valid).indices
        return stack_merged(
            [
                self._tile(visual, tile, dominant[tile], count)
                for tile, count in enumerate(few.tolist())
            ]
        )

    def _split(self, count: int) -> int:
        """Contextual tokens among `count`."""
        contextual = count * 5 // 32 if self.contextual is None else self.contextual
        if contextual >= count:
            raise PruningError(
                f"visionzip cannot make {contextual} contextual tokens and keep a dominant one in "
                f"a budget of {count} a tile; keep more, or set contextual={count - 1} or less"
            )
        return contextual

    def _tile(
        self, visual: VisualTokens, tile: int, dominant: Tensor, contextual: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected tokens [K, D], their sources [K, N] and places [K]."""
        x, total = visual.features[tile], visual.projected.shape[1]
        dominant = dominant[dominant >= 0].sort().values
        kept = one_hot(dominant, total).bool()
        free = ~kept.any(dim=0) if visual.valid is None else visual.valid[tile] & ~kept.any(dim=0)
        members = self._clusters(visual.extra("encoder_keys")[tile], free, contextual)
        # The class token, if there is one, comes first of all.
        lead = int(visual.class_token)
        made = [visual.extra("cls_feature")[tile].to(x)] if lead else []
        for target, others in members:
            gathered = x[others].sum(dim=0)
            size = max(1, len(others))
            made.append(
                x[target] + gathered / size
                if self.ctx_merge == "sum"
                else (x[target] + gathered) / (1 + len(others))
            )
        new = visual.projected.new_empty(0, visual.projected.shape[-1])
        if made:
            new = visual.projector(torch.stack(made)).to(visual.projected.dtype)
        sources = torch.zeros(lead + contextual, total, dtype=torch.bool, device=x.device)
        for row, (target, others) in enumerate(members, start=lead):
            sources[row, target] = sources[row, others] = True
        place = torch.full((lead + contextual,), -2, device=x.device)
        place[:lead] = -1
        return (
            torch.cat([new[:lead], visual.projected[tile, dominant], new[lead:]]),
            torch.cat([sources[:lead], kept, sources[lead:]]),
            torch.cat([place[:lead], dominant, place[lead:]]),
        )

    @torch.no_grad()
    def _clusters(self, keys: Tensor, free: Tensor, contextual: int) -> list[tuple[Tensor, Tensor]]:
        """(target, LongTensor of the patches assigned to it) of every contextual token."""
        if contextual == 0:
            return []
        rest = free.nonzero().flatten()
        step = max(1, len(rest) // contextual)
        is_target = torch.zeros_like(rest, dtype=torch.bool)
        is_target[: step * contextual : step] = True
        targets, others = rest[is_target], rest[~is_target]
        nearest = normalize(keys[others], dim=-1) @ normalize(keys[targets], dim=-1).T
        assigned = nearest.argmax(dim=1)
        return [(target, others[assigned == i]) for i, target in enumerate(targets)]
