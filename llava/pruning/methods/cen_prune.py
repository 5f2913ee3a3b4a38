"""Cen-Prune."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.importance.normalise import centre, min_max, scale_channels, sigmoid_of_z_score
from llava.pruning.importance.similarity import distinctiveness
from llava.pruning.method import Picks, PruningMethod, Rows, VisualTokens, option, register, varies
from llava.pruning.registry import get_method, list_methods, make_method


@register
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

    name = "cen-prune"
    signal = "host's, on centred tokens x distinctiveness"
    paper = "arXiv 2608.30263"
    fidelity = "vectors"

    host: str = option("divprune")
    host_options: Mapping[str, Any] = option(default_factory=dict)
    form: str = option("llava", choices=("llava", "qwen"))

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._host  # what cannot be wrapped is refused here

    @cached_property
    def _host(self) -> PruningMethod:
        host, settings = make_method(self.host, self.host_options), dict(self.host_options)
        if not type(host).compares:
            hosts = ", ".join(name for name in list_methods() if get_method(name).compares)
            reason = f", which does not select by how similar tokens are; host can be {hosts}"
        elif host.merges:
            reason = f" with {settings}: these options make it return more than a set of tokens"
        elif not host.compares:
            reason = f" with {settings}: nothing is left to centre where similarity does not count"
        else:
            return host
        raise PruningError(f"cen-prune cannot wrap {self.host!r}{reason}")

    @varies(())
    def needs(self) -> tuple[str, ...]:
        features = ("features",) if self.form == "qwen" else ()
        return tuple(dict.fromkeys((*features, *self._host.needs)))

    @varies(())
    def wants(self) -> tuple[str, ...]:
        return self._host.wants

    def label(self, tokens: VisualTokens) -> str:
        return f"{self.name}({self._host.label(tokens)})"

    def score(self, tokens: VisualTokens) -> Tensor | None:
        return self._host.score(tokens)

    def compared(self, tokens: VisualTokens) -> Tensor:
        if self.form == "qwen":
            return scale_channels(tokens.features, tokens.valid, tokens.tile_sizes())
        return self._host.compared(tokens)

    def select(self, rows: Rows) -> Picks:
        z, valid, room = rows.z, rows.valid, rows.room
        distinct = distinctiveness(z, valid, room)
        weight = (
            sigmoid_of_z_score(distinct, valid, room)
            if self.form == "qwen"
            else min_max(distinct, valid)
        )
        return self._host.select(replace(rows, z=centre(z, valid, room), weight=weight))
