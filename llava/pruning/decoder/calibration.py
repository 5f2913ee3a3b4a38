"""Measure what `pore` and `btp` need to know of a model, in passes that drop nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.layers import DecoderLayers, Rotary, attention_rows
from llava.pruning.errors import PruningError

_BINS = 576

Observe = Callable[[int, Tensor, Rotary], None]


@contextmanager
def watching(decoder: DecoderLayers, observe: Observe) -> Iterator[None]:
    """Call `observe(layer, hidden, rotary)` with the inputs of every layer that runs inside."""

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(layer, args[0], kwargs["position_embeddings"])

        return hook

    with ExitStack() as undo:
        for number, layer in enumerate(decoder.layers):
            handle = layer.register_forward_pre_hook(hook_of(number), with_kwargs=True)
            undo.callback(handle.remove)
        yield


class Curve(NamedTuple):
    """f(x) = mu exp(sigma x)."""

    mu: float
    sigma: float


class PlaceCurve:
    """Mean attention of the prompts' last tokens in one layer, by the place x = i / N in an image.

    Images of other sizes fall into the same 576 parts of [0, 1).

    Args:
        decoder: the layers.
        layer: which of them.
    """

    def __init__(self, decoder: DecoderLayers, layer: int) -> None:
        self._decoder, self._layer = decoder, layer
        # Sums of x, of attention, and of ones.
        self._sums = torch.zeros(3, _BINS, dtype=torch.float64)

    def observe(self, columns: VisualColumns, layer: int, hidden: Tensor, rotary: Rotary) -> None:
        """Take the attention of prompts with these columns, if this is the layer."""
        if layer != self._layer:
            return
        valid = columns.mask.to(hidden.device)
        every = torch.arange(columns.width, device=hidden.device)
        last = (every * valid).amax(dim=1, keepdim=True)
        attention = attention_rows(self._decoder, layer, hidden, rotary, valid, last)
        mean = attention.mean(dim=(1, 2)).double().cpu()
        visual = columns.image >= 0
        totals = torch.tensor([image.total for image in columns.images])
        x = columns.place[visual].double() / totals[columns.image[visual]]
        for row, values in zip(self._sums, (x, mean[visual], torch.ones_like(x)), strict=True):
            row.index_add_(0, (x * _BINS).round().long().clamp(max=_BINS - 1), values)

    def fit(self) -> Curve:
        """Fit a line to the logarithm of the mean at every place, by least squares.

        Raises:
            PruningError: fewer than two places got attention.
        """
        x, attention, count = self._sums[:, (self._sums[2] > 0) & (self._sums[1] > 0)]
        if len(x) < 2:
            raise PruningError(
                "no curve can be fitted: the items show fewer than two visual tokens"
            )
        x, logs = x / count, (attention / count).log()
        centred = x - x.mean()
        sigma = float((centred * logs).sum() / (centred * centred).sum())
        return Curve(float((logs.mean() - sigma * x.mean()).exp()), sigma)


class LayerChanges:
    """Cosine similarity of visual tokens before and after every layer but the last.

    Args:
        depth: layers.
    """

    def __init__(self, depth: int) -> None:
        self._sums, self._count = [0.0] * (depth - 1), 0
        self._before: Tensor | None = None

    def observe(self, columns: VisualColumns, layer: int, hidden: Tensor, rotary: Rotary) -> None:
        """Take the hidden states of prompts with these columns."""
        visual = hidden[(columns.image >= 0).to(hidden.device)].float()
        if layer > 0:
            assert self._before is not None
            self._sums[layer - 1] += float(cosine_similarity(self._before, visual, dim=1).sum())
        else:
            self._count += len(visual)
        self._before = visual

    def similarities(self) -> list[float]:
        """Return the mean similarity of every layer's input and output, without the last.

        Raises:
            PruningError: no visual token was seen.
        """
        if not self._count:
            raise PruningError("no stages can be found: the items show no visual token")
        return [total / self._count for total in self._sums]


def find_stages(similarities: Sequence[float], stages: int) -> list[int]:
    """Return the layers before which to cut, ascending: right behind those that change most.

    BTP names no rule for neighbours. Here a layer that changes tokens more than both its neighbours
    comes first, those that change most before others, then the rest.

    Args:
        similarities: of every layer's input and output, without the last layer.
        stages: how many layers; fewer where the model has no more.
    """

    def rank(layer: int) -> tuple[bool, float]:
        around = [*similarities[max(0, layer - 1) : layer], *similarities[layer + 1 : layer + 2]]
        peak = all(similarities[layer] < other for other in around)
        return not peak, similarities[layer]

    ranked = sorted(range(len(similarities)), key=rank)
    return sorted(layer + 1 for layer in ranked[:stages])
