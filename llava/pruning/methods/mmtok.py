"""MMTok."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register, varies
from llava.pruning.precision import widen
from llava.pruning.selection.coverage import cover


@register
class MMTok(PruningMethod):
    """Keep the tokens that cover the words of the question and the rest of the image.

    Paper: MMTok, ICLR 2026, arXiv 2508.18264.

        P     = softmax_j(cos(t_i, z_j) / tau_t) / m      (m words; z after the projector)
        Q     = softmax_j(cos(x_i, x_j) / tau_v) / n      (n patches; x before the projector)
        C     = [P ; alpha Q]
        then    argmax_j sum_u max(0, C_uj - max_{s picked} C_us), until k are picked

    Words are the language model's embeddings of the question without answer format and stop words
    (`llava/model/prompt_inputs.py`; recorded runs show a part of the released list, see there). The
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

    name = "mmtok"
    signal = "coverage of question words and patches"
    paper = "ICLR 2026, arXiv 2508.18264"
    query_aware = True
    fidelity = "golden"

    tau_t: float = option(0.02, above=0)
    tau_v: float = option(0.2, above=0)
    alpha: float = option(0.5, above=0)
    text: str = option("question", choices=("question", "none"))
    keywords: str = option("release", choices=("release", "content"))
    padding: str = option("cover", choices=("cover", "keep"))

    @varies(("features", "question_embeddings"))
    def needs(self) -> tuple[str, ...]:
        return ("features", "question_embeddings") if self.text == "question" else ("features",)

    @varies("release")
    def keyword_rule(self) -> str:
        return self.keywords

    def label(self, tokens: VisualTokens) -> str:
        unknown = tokens.layouts is not None and tokens.blank is None and self.padding == "cover"
        return f"{self.name}(padding=unknown)" if unknown else self.name

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Picks:
        visual, own = rows.tokens, rows.tokens.features[row, tokens]
        parts = [self.alpha * _shares(own, own, self.tau_v)]
        if self.text == "question":
            words = visual.extra("question_embeddings")[int(visual.image_index[row])]
            parts.insert(0, _shares(words, rows.z[row, tokens], self.tau_t))
        last = None
        if self.padding == "cover" and visual.blank is not None:
            last = visual.blank[row, tokens].to(own.device)
        picks = cover(torch.cat(parts), count, last)
        return Picks(tokens[picks.indices], picks.margins)


def _shares(rows: Tensor, columns: Tensor, tau: float) -> Tensor:
    """Return softmax over the columns of cosine / tau, divided by r: [r, c]."""
    columns = normalize(widen(columns), dim=-1, eps=1e-8)
    rows = normalize(rows.to(columns), dim=-1, eps=1e-8)
    return (rows @ columns.T / tau).softmax(dim=-1) / max(len(rows), 1)
