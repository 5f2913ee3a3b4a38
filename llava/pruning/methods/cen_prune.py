"""Cen-Prune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.normalise import min_max
from llava.pruning.importance.similarity import (
    centred,
    distinctiveness,
    scaled,
    sigmoid_of_z_score,
)
from llava.pruning.method import PruningMethod, SimilarityMethod, check_choice
from llava.pruning.registry import get_method, list_methods, make_method, register
from llava.pruning.selection.rows import Picks
from llava.pruning.tokens import VisualTokens


@register
@dataclass(frozen=True)
class CenPrune(PruningMethod):
    """Another method, the host, on tokens without what all of them share.

    Paper: Cen-Prune, arXiv 2608.30263; no code was released.

        z_i   -> z_i - mean_j z_j                     (what the host compares, per tile)
        g_i    = -mean_{j != i} cos(z_i, z_j)         (before centring), min-max normalised
        score -> g_i * score                          (tokens near the mean only look far apart)

    With `divprune` the first pick is DivPrune's on centred tokens and g weighs the others; with
    `zoo`, `zoo-exact` and `norm` g multiplies the normalised importance; with `cdpruner` the
    relevance. With allocation="global" the mean is the image's. Tokens are those the host compares:
    after the projector, as the paper has them, but for `cdpruner`, whose `tokens=projected` in
    host_options is the paper's.

    `form="qwen"` is the published form for models whose merger mixes neighbours and whose tokens
    are nearly parallel: it compares tokens before the projector, every channel divided by
    sqrt(var + 1e-6) over the tile, and g becomes sigmoid((g - mean) / std). There a token is the
    mean of what the merger joins, which the pipeline of such a model has to provide. The paper
    names neither the 1e-6 nor the kind of std; population values here.

    Options: host; form `llava` | `qwen`; host_options, a mapping of the host's own options. On the
    command line `--pruner-option host=zoo --pruner-option 'host_options={"directions": 32}'`.
    """

    name: ClassVar[str] = "cen-prune"
    signal: ClassVar[str] = "host's, on centred tokens x distinctiveness"
    paper: ClassVar[str] = "arXiv 2608.30263"
    fidelity: ClassVar[str] = "vectors"

    host: str = "divprune"
    host_options: Mapping[str, Any] = field(default_factory=dict)
    form: str = "llava"
    _host: SimilarityMethod = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("llava", "qwen"))
        host = _make_host(self.host, self.host_options)
        object.__setattr__(self, "_host", host)
        needs = ("features", *host.needs) if self.form == "qwen" else host.needs
        self.set_needs(*dict.fromkeys(needs), wants=host.wants)

    def label(self, visual: VisualTokens) -> str:
        return f"{self.name}({self._host.label(visual)})"

    def importance(self, visual: VisualTokens) -> Tensor | None:
        return self._host.importance(visual)

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        valid = visual.valid
        if self.form == "qwen":
            z = scaled(visual.features, valid)
            factor = sigmoid_of_z_score(distinctiveness(z, valid), valid)
        else:
            z = self._host.compared(visual)
            factor = min_max(distinctiveness(z, valid), valid)
        return self._host.choose_among(
            centred(z, valid), importance, counts, valid=valid, factor=factor
        )


def _make_host(name: str, options: Mapping[str, Any]) -> SimilarityMethod:
    """The host; PruningError for a method that compares no tokens, or does not with `options`."""
    if not isinstance(options, Mapping):
        raise PruningError(f"host_options must be a mapping of names to values, got {options!r}")
    host = make_method(name, options)
    if not isinstance(host, SimilarityMethod):
        hosts = [
            other for other in list_methods() if issubclass(get_method(other), SimilarityMethod)
        ]
        raise PruningError(
            f"cen-prune cannot wrap {name!r}, which does not choose by how similar tokens are; "
            f"host can be {', '.join(hosts)}"
        )
    if host.merges:
        raise PruningError(
            f"cen-prune cannot wrap {name!r} with {dict(options)}: these options make it return "
            "something else than a set of tokens"
        )
    if not host.compares:
        raise PruningError(
            f"cen-prune cannot wrap {name!r} with {dict(options)}: nothing is left to centre where "
            "similarity does not count"
        )
    return host
