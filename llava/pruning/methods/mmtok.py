"""MMTok."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.methods.base import PruningMethod, check_choice
from llava.pruning.registry import register
from llava.pruning.selection.coverage import cover
from llava.pruning.selection.max_min import selectable
from llava.pruning.selection.picks import Picks, joined
from llava.pruning.tokens import VisualTokens

TEXTS = ("question", "none")


@register
@dataclass(frozen=True)
class MMTok(PruningMethod):
    """Keep the tokens that cover the words of the question and the rest of the image.

    Paper: MMTok, ICLR 2026, arXiv 2508.18264.

        P     = softmax_j(cos(t_i, z_j) / tau_t) / m      (m words; z after the projector)
        Q     = softmax_j(cos(x_i, x_j) / tau_v) / n      (n patches; x before the projector)
        C     = [P ; alpha Q]
        then    argmax_j sum_u max(0, C_uj - max_{s picked} C_us), until k are picked

    Words are the language model's embeddings of the question without answer format and stop words
    (`llava/model/instruction.py`; that list is ours, the released one may differ). Where the
    released code differs: it normalises in half precision, takes a stock question where none is
    given (here an error, or `text=none`), and can leave out the padding of square images, which
    this does only where the pipeline marks it (LLaVA-1.6).

    Options: tau_t, tau_v, alpha; text `question` | `none`, which covers the image alone.
    """

    name: ClassVar[str] = "mmtok"
    signal: ClassVar[str] = "coverage of question words and patches"
    paper: ClassVar[str] = "ICLR 2026, arXiv 2508.18264"
    needs: ClassVar[tuple[str, ...]] = ("features", "question_embeddings")
    query_aware: ClassVar[bool] = True
    fidelity: ClassVar[str] = "vectors"

    tau_t: float = 0.02
    tau_v: float = 0.2
    alpha: float = 0.5
    text: str = "question"

    def __post_init__(self) -> None:
        check_choice("text", self.text, TEXTS)
        for name in ("tau_t", "tau_v", "alpha"):
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if not real or not 0 < value < math.inf:
                raise PruningError(f"{name} must be a positive number, got {value!r}")
        self.set_needs("features", *(("question_embeddings",) if self.text == "question" else ()))

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        words = visual.extra("question_embeddings") if self.text == "question" else None
        rows = []
        for row, count in enumerate(counts.tolist()):
            tokens = selectable(visual.projected, visual.valid, row)
            own = visual.features[row, tokens]
            parts = [self.alpha * _shares(own, own, self.tau_v)]
            if words is not None:
                question = words[int(visual.image_index[row])].to(own.device)
                parts.insert(0, _shares(question, visual.projected[row, tokens], self.tau_t))
            picks = cover(torch.cat(parts), count)
            rows.append(Picks(tokens[picks.indices], picks.margins))
        return joined(rows)


def _shares(rows: Tensor, columns: Tensor, tau: float) -> Tensor:
    """[r, c]: softmax over the columns of cosine / tau, divided by r."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    unit = [
        x.to(wide) / x.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-8) for x in (rows, columns)
    ]
    return (unit[0] @ unit[1].T / tau).softmax(dim=-1) / max(len(rows), 1)
