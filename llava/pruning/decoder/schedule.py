"""Schedules: before which layers tokens are dropped, and how many are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava.pruning.errors import PruningError

# Depth of the models that layer numbers were published for.
PUBLISHED_DEPTH = 32


class UnreachableBudgetError(PruningError):
    """A budget below what the layers before the cuts read by themselves.

    Attributes:
        floor: the lowest mean number of tokens a layer, as a whole number.
    """

    def __init__(self, message: str, floor: int) -> None:
        super().__init__(message)
        self.floor = floor


@dataclass(frozen=True)
class Schedule:
    """How many visual tokens of one image are left after every cut.

    Attributes:
        layers: indices (from 0) of the layers before which tokens are dropped, ascending.
        keep: how many of the tokens stay at each; None where content decides.
        made: how many tokens are made of the dropped ones at each, besides those kept.
    """

    layers: tuple[int, ...]
    keep: tuple[int, ...] | None
    made: tuple[int, ...] = ()

    def left(self, cut: int) -> int:
        """Return the tokens after a cut, those made included."""
        assert self.keep is not None
        return self.keep[cut] + (self.made[cut] if self.made else 0)

    def makes(self, layer: int) -> bool:
        """Return whether tokens are made before a layer."""
        return bool(self.made) and layer in self.layers and self.made[self.layers.index(layer)] > 0

    def per_layer(self, tokens: int, depth: int) -> list[int]:
        """Count what every one of `depth` layers reads of an image that enters with `tokens`."""
        counts, left = [], tokens
        for layer in range(depth):
            if layer in self.layers:
                left = self.left(self.layers.index(layer))
            counts.append(left)
        return counts

    def mean(self, tokens: int, depth: int) -> float:
        """Return the mean of `per_layer`."""
        return sum(self.per_layer(tokens, depth)) / depth


def at_depth(published: Sequence[int], depth: int) -> tuple[int, ...]:
    """Move layer numbers of a model with 32 layers to the same fraction of another depth.

    None comes before layer 1, because what layer 0 reads cannot be scored yet. Numbers may fall
    together in shallow models.

    Raises:
        PruningError: the model has a single layer.
    """
    if depth < 2:
        raise PruningError("a language model of one layer has no place between layers")
    layers = (round(layer * depth / PUBLISHED_DEPTH) for layer in published)
    return tuple(min(max(1, layer), depth - 1) for layer in layers)


def check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return layers as a user names them.

    Raises:
        PruningError: they do not ascend, or the model is not that deep.
    """
    if [*layers] != sorted({*layers}) or not layers or layers[0] < 1 or layers[-1] >= depth:
        raise PruningError(
            f"layers must ascend and lie in 1 to {depth - 1} for a language model of {depth} "
            f"layers, got {[*layers]}"
        )
    return tuple(layers)


def merged_stages(layers: Sequence[int], keep: Sequence[int]) -> Schedule:
    """Make a schedule of stages; of several at one layer the last counts.

    A stage keeps no more than the one before.
    """
    left: dict[int, int] = {}
    least = math.inf
    for layer, count in zip(layers, keep, strict=True):
        least = min(least, count)
        left[layer] = int(least)
    return Schedule(tuple(left), tuple(left.values()))


def between(steps: Sequence[Sequence[float]], at: float) -> list[float]:
    """Interpolate linearly between lists of numbers: the first at 0, the last at 1."""
    place = at * (len(steps) - 1)
    lower = min(int(place), len(steps) - 2)
    share = place - lower
    pairs = zip(steps[lower], steps[lower + 1], strict=True)
    return [(1 - share) * low + share * high for low, high in pairs]


def solve(
    tokens: int, depth: int, budget: float, family: Callable[[float], Schedule], name: str
) -> Schedule:
    """Find the schedule of a family whose mean over layers is nearest to a budget.

    Args:
        tokens: of the image where it enters the language model; at least `budget`.
        depth: layers of the language model.
        budget: the mean asked for.
        family: schedules that keep more the larger their argument, which is in [0, 1]; 0 keeps
            the least there is.
        name: of the method, for the error.

    Raises:
        UnreachableBudgetError: even the least is above the budget.
    """
    least = family(0.0)
    floor = least.mean(tokens, depth)
    if budget < floor:
        lowest = math.ceil(floor)
        raise UnreachableBudgetError(
            f"{name} cannot reach a mean of {budget:g} visual tokens a layer: its first cut is "
            f"before layer {least.layers[0]} of {depth}, and the layers until its last cut alone "
            f"make {floor:g}; keep at least {lowest}, or prune before the language model too",
            lowest,
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if family(middle).mean(tokens, depth) <= budget:
            low = middle
        else:
            high = middle

    def distance(schedule: Schedule) -> float:
        return abs(schedule.mean(tokens, depth) - budget)

    return min(family(low), family(high), key=distance)
