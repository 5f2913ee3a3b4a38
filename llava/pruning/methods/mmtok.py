"""MMTok."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.method import PruningMethod, check_choice
from llava.pruning.registry import register
from llava.pruning.selection.coverage import cover
from llava.pruning.selection.max_min import selectable
from llava.pruning.selection.rows import Picks, joined
from llava.pruning.tokens import VisualTokens

TEXTS = ("question", "none")
KEYWORDS = ("release", "content")
PADDINGS = ("cover", "keep")


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
    (`llava/model/instruction.py`; recorded runs show a part of the released list, see there). The
    square of LLaVA-1.5 has padding: with `padding="cover"` it has to be covered like the rest and
    is kept only where all other patches are. On LLaVA-1.6, padding that the model does not read is
    neither covered nor kept; the released code reads it there and keeps k of every tile:
    `mm_next_protocol="spatial"` with 5 k here.

    Where the released code differs: it normalises in the model's half precision, and takes a stock
    question where none is given (here an error, or `text="none"`). Where fewer patches than k show
    the image, it repeats the first patch; here padding fills up. It tells LLaVA-1.5 by the name of
    the checkpoint, here `image_aspect_ratio` does; where an image's size is not given, its padding
    is not known, and the label says so.

    Options: tau_t, tau_v, alpha; text `question` | `none`, which covers the image alone; keywords
    `release` (the released code's) | `content` (a longer list of stop words of our own); padding
    `cover` (the released code's) | `keep` (like any other patch).
    """

    name: ClassVar[str] = "mmtok"
    signal: ClassVar[str] = "coverage of question words and patches"
    paper: ClassVar[str] = "ICLR 2026, arXiv 2508.18264"
    needs: ClassVar[tuple[str, ...]] = ("features", "question_embeddings")
    query_aware: ClassVar[bool] = True
    fidelity: ClassVar[str] = "golden"

    tau_t: float = 0.02
    tau_v: float = 0.2
    alpha: float = 0.5
    text: str = "question"
    keywords: str = "release"
    padding: str = "cover"

    def __post_init__(self) -> None:
        check_choice("text", self.text, TEXTS)
        check_choice("keywords", self.keywords, KEYWORDS)
        check_choice("padding", self.padding, PADDINGS)
        for name in ("tau_t", "tau_v", "alpha"):
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if not real or not 0 < value < math.inf:
                raise PruningError(f"{name} must be a positive number, got {value!r}")
        self.set_needs("features", *(("question_embeddings",) if self.text == "question" else ()))

    @property
    def keyword_rule(self) -> str:
        return self.keywords

    def label(self, visual: VisualTokens) -> str:
        unknown = visual.layouts is not None and visual.blank is None and self.padding == "cover"
        return f"{self.name}(padding=unknown)" if unknown else self.name

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
            last = None
            if self.padding == "cover" and visual.blank is not None:
                last = visual.blank[row, tokens].to(own.device)
            picks = cover(torch.cat(parts), count, last)
            rows.append(Picks(tokens[picks.indices], picks.margins))
        return joined(rows)


def _shares(rows: Tensor, columns: Tensor, tau: float) -> Tensor:
    """[r, c]: softmax over the columns of cosine / tau, divided by r."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    unit = [
        x.to(wide) / x.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-8) for x in (rows, columns)
    ]
    return (unit[0] @ unit[1].T / tau).softmax(dim=-1) / max(len(rows), 1)
