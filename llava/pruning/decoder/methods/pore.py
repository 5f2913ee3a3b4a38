"""PoRe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.curves import curve_weights, growth
from llava.pruning.decoder.method import DecoderMethod, Made, Schedule, Stage, option, register
from llava.pruning.decoder.padding import RULES, shown_tokens
from llava.pruning.decoder.registry import make_decoder_method
from llava.pruning.decoder.schedule import UnreachableBudgetError
from llava.pruning.errors import PruningError
from llava.pruning.indices import constant
from llava.pruning.options import varies

# Host -> its default curve, and the rule of its released mask.
_HOSTS = {
    "fastv": ("fastv", "half"),
    "pyramiddrop": ("pyramiddrop", "percent"),
    "sparsevlm": ("sparsevlm", "bilinear"),
    "btp": ("pyramiddrop", "half"),
}


@register
class PoRe(DecoderMethod):
    """Another method, the host, whose scores are freed of position and padding.

    Paper: "Attention Debiasing for Token Pruning in Vision Language Models", arXiv 2508.17807; its
    first version is called PoRe.

        f(x) = mu exp(sigma x)             mean attention at place i of N, x = i / N, fitted
        s_i -> s_i / f(i / N)              mu moves no rank, so weights are exp(-sigma i / N)
        s_i -> 0 for padding               around the image, where LLaVA pads it to a square

    As in the released patches both act on the host's first cut only, and with `fastv` at most as
    many tokens stay as are no padding. Nothing was released for `btp`: it gets PyramidDrop's curve
    and FastV's rule for padding.

    The released weights were fitted on each benchmark's own evaluation data. They are options by
    name (`pyramiddrop-gqa`, `sparsevlm-pope`, ...); the default of a host is the mean of its ten
    (1.89 and 1.94), for `fastv` its one cubic, 1 + 1.7368 x - 4.8432 x^2 + 4.9097 x^3. A curve of
    data that are not evaluated comes from `llava calibrate pore`.

    Options: host `fastv` | `pyramiddrop` | `sparsevlm` | `btp`; host_options, a mapping; curve, a
    name, `none`, or a file of `llava calibrate pore`; padding `released` (the host's own rule) |
    `none` | `half` and `percent`, a patch with more than .5 or .01 of padding | `bilinear`, a mask
    read at the centres of patches | `cells`, whole rows and columns, FastV's other released mask.
    """

    name = "pore"
    signal = "host's, over the curve of position, without padding"
    paper = "arXiv 2508.17807"
    fidelity = "vectors"

    host: str = option("fastv", choices=tuple(_HOSTS))
    host_options: Mapping[str, Any] = option(default_factory=dict)
    curve: str | None = option(None)
    padding: str = option("released", choices=("released", "none", *RULES))

    def __post_init__(self) -> None:
        if self.curve is not None and not isinstance(self.curve, str):
            raise PruningError(f"curve must be a name or a .json file, got {self.curve!r}")
        super().__post_init__()
        _ = self._host, self.weights(torch.zeros(1), 1)  # what cannot be used is refused here

    @cached_property
    def _host(self) -> DecoderMethod:
        return make_decoder_method(self.host, self.host_options)

    @cached_property
    def _curve(self) -> str | float:
        """The curve: a name, or what a file holds, which is read once."""
        curve = _HOSTS[self.host][0] if self.curve is None else self.curve
        return growth(curve) if curve.endswith(".json") else curve

    @property
    def _rule(self) -> str:
        return _HOSTS[self.host][1] if self.padding == "released" else self.padding

    @varies("previous")
    def scored_by(self) -> str:
        return self._host.scored_by

    @varies("original")
    def positions(self) -> str:
        return self._host.positions

    @varies(False)
    def budgeted(self) -> bool:
        return self._host.budgeted

    @varies(True)
    def fixed_count(self) -> bool:
        return self._host.fixed_count

    @property
    def files(self) -> tuple[str, ...]:
        own = self.curve is not None and self.curve.endswith(".json")
        return (*self._host.files, *((str(self.curve),) if own else ()))

    def check_budget(self, given: bool) -> None:
        self._host.check_budget(given)

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        try:
            return self._host.plan(tokens, depth, budget)
        except UnreachableBudgetError as error:
            raise UnreachableBudgetError(f"{self.name} with host {error}", error.floor) from error

    def adapt(self, schedule: Schedule, columns: VisualColumns, image: int) -> Schedule:
        schedule = self._host.adapt(schedule, columns, image)
        if self.host != "fastv" or self._rule == "none" or not schedule.keep:
            return schedule
        shown = shown_tokens(columns.images[image], self._rule)
        left = int(shown[columns.place[columns.image == image]].sum())
        return replace(schedule, keep=tuple(min(left, count) for count in schedule.keep))

    def relabel(self, columns: VisualColumns) -> VisualColumns:
        return self._host.relabel(columns)

    def begin(self, stage: Stage) -> Any:
        return self._host.begin(stage)

    def score(self, stage: Stage) -> Tensor:
        scores = self._host.score(stage)
        if 0 not in stage.cuts:
            return scores
        device = scores.device
        totals = constant(tuple(image.total for image in stage.images), device)[:, None]
        weights = self.weights(stage.place, totals)
        if self._rule != "none":
            flags = [shown_tokens(image, self._rule) for image in stage.images]
            shown = pad_sequence(flags, batch_first=True).to(device, non_blocking=True)
            weights = weights * shown.gather(1, stage.place)
        first = constant(tuple(int(cut == 0) for cut in stage.cuts), device)[:, None].bool()
        return scores * torch.where(first, weights, 1).to(scores.dtype)

    def weights(self, place: Tensor, total: Tensor | int) -> Tensor:
        """Return one over the curve at places of an image with `total` tokens, float64."""
        return curve_weights(self._curve, place, total)

    def select(self, stage: Stage, scores: Tensor, counts: Sequence[int]) -> Tensor:
        return self._host.select(stage, scores, counts)

    def make(self, stage: Stage, scores: Tensor, kept: Tensor) -> Made | None:
        return self._host.make(stage, scores, kept)
