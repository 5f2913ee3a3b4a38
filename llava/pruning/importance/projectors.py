"""Read the structure of projectors, make low-rank copies of them."""

import copy
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.importance.derivatives import ELEMENTWISE
from llava.pruning.importance.weight_cache import WeightCache
from llava.pruning.precision import widen


class TwoLayer(NamedTuple):
    """Projector M(x) = W2 act(W1 x + b1) + b2."""

    first: nn.Linear
    act: nn.Module
    second: nn.Linear


def two_layer(projector: nn.Module) -> TwoLayer | None:
    """Return the parts of a Linear-activation-Linear projector, None for anything else."""
    layers = _chain(projector)
    if len(layers) != 3:
        return None
    first, act, second = layers
    if type(first) is nn.Linear and type(second) is nn.Linear and type(act) in ELEMENTWISE:
        return TwoLayer(first, act, second)
    return None


def linear_matrix(projector: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Return the product matrix [D, Dv] of a chain of Linear layers, None for anything else."""
    layers = _chain(projector)
    if not layers or any(type(layer) is not nn.Linear for layer in layers):
        return None
    matrix = cast(nn.Linear, layers[0]).weight.to(dtype)
    for layer in layers[1:]:
        matrix = cast(nn.Linear, layer).weight.to(dtype) @ matrix
    return matrix


def evaluating(projector: nn.Module) -> nn.Module:
    """Return the projector as it is outside training, with the same weights.

    Dropout would turn differences into noise and draw random numbers. A projector in training is
    copied around its tensors, not switched: it may be in use elsewhere.
    """
    if not any(module.training for module in projector.modules()):
        return projector
    tensors = [*projector.parameters(), *projector.buffers()]
    return copy.deepcopy(projector, {id(tensor): tensor for tensor in tensors}).eval()


def _chain(projector: nn.Module) -> list[nn.Module]:
    """Return the layers of a plain nn.Sequential, any other module as its own single layer."""
    if isinstance(projector, nn.Sequential) and type(projector).forward is nn.Sequential.forward:
        return list(projector)
    return [projector]


_low_rank_copies = WeightCache()


def low_rank(projector: nn.Module, rank: int) -> nn.Module:
    """Return a copy with the sensitivity of the rank-`rank` projector (ZOO-Prune on LLaVA-NeXT).

    Every Linear weight W = U S V^T is cut to its `rank` largest singular values. In a
    Linear-activation-Linear projector the last layer becomes S V^T alone: U has orthonormal
    columns, so every ||J u|| stays what it is while the output shrinks from D to `rank`.
    The copy serves sensitivities only; its outputs are not embeddings.
    """
    return _low_rank_copies.get(projector, rank, lambda: _truncated(projector, rank))


def untrained(projector: nn.Module, rank: int, seed: int) -> nn.Module:
    """Return what ZOO-Prune's released code scores with on LLaVA-NeXT instead of `low_rank`.

    Its low-rank copy is cut before weights are loaded, so its factors [rank, in] and [out, rank]
    are freshly initialised, N(0, 0.02), biases 0. Here they are drawn from `seed`.

    Raises:
        PruningError: the projector is not Linear-activation-Linear.
    """
    parts = two_layer(projector)
    if parts is None:
        raise PruningError(
            "an untrained projector is defined for Linear-activation-Linear projectors only; "
            "use projector_weights='trained'"
        )
    generator = torch.Generator().manual_seed(seed)

    def product(layer: nn.Linear) -> nn.Linear:
        draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        inner = draw(rank, layer.in_features) * 0.02
        outer = draw(layer.out_features, rank) * 0.02
        return _linear((outer @ inner).to(layer.weight.device))

    def build() -> nn.Module:
        return nn.Sequential(product(parts.first), copy.deepcopy(parts.act), product(parts.second))

    return _low_rank_copies.get(projector, ("untrained", rank, seed), build)


def _truncated(projector: nn.Module, rank: int) -> nn.Module:
    parts = two_layer(projector)
    if parts is not None:
        first = copy.deepcopy(parts.first)
        u, s, vh = _svd(first.weight, rank)
        first.weight.data = (u * s) @ vh
        _, s, vh = _svd(parts.second.weight, rank)
        return nn.Sequential(first, copy.deepcopy(parts.act), _linear(s[:, None] * vh))
    duplicate = copy.deepcopy(projector)
    for module in duplicate.modules():
        if isinstance(module, nn.Linear):
            u, s, vh = _svd(module.weight, rank)
            module.weight.data = (u * s) @ vh
    return duplicate


def _linear(weight: Tensor) -> nn.Linear:
    """Make a layer without bias of weights [out, in]; no others are drawn to initialise it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `rank` singular triplets, or all, in float32 (float64 stays)."""
    u, s, vh = torch.linalg.svd(widen(weight.detach()), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
