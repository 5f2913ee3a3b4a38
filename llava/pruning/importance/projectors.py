"""Read the structure of projectors, make low-rank copies of them."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.importance.derivatives import elementwise
from llava.pruning.importance.structure import Answers, leaves, small_copy
from llava.pruning.importance.weight_cache import WeightCache
from llava.pruning.precision import widen


class TwoLayer(NamedTuple):
    """Projector M(x) = W2 act(W1 x + b1) + b2."""

    first: nn.Linear
    act: nn.Module
    second: nn.Linear


class Norm(NamedTuple):
    """Normalisation of [..., C]: y = (weight + shift) o (x - mean) / sqrt(variance + eps) + bias.

    Attributes:
        module: the layer.
        width: C.
        eps: as in the formula.
        centred: whether the mean is taken off (LayerNorm); otherwise (RMSNorm) it counts as 0, in
            the variance too.
        shift: 1 where the layer's weight is kept as the difference from 1 (Gemma), else 0.
    """

    module: nn.Module
    width: int
    eps: float
    centred: bool
    shift: float = 0.0

    def scale(self, dtype: torch.dtype) -> Tensor | None:
        """Return gamma [C], what the normalised numbers are multiplied with; None for ones."""
        weight = cast(Tensor | None, self.module.weight)
        return None if weight is None else weight.detach().to(dtype) + self.shift

    def offset(self, dtype: torch.dtype) -> Tensor | None:
        """Return beta [C], what is added after that; None for zeros."""
        bias = cast(Tensor | None, getattr(self.module, "bias", None))
        return None if bias is None else bias.detach().to(dtype)


class NormedMerger(NamedTuple):
    """Projector of x = (x_1 .. x_G) [G * C]: W2 act(W1 (norm(x_1), .., norm(x_G)) + b1) + b2."""

    norm: Norm
    groups: int
    mlp: TwoLayer


class JoinedMerger(nn.Module):
    """Takes one row for each token, where a merger takes one for each of the patches it joins.

    Shares the merger: its weights are not copied. Scores keep what they compute from the weights by
    merger, so a new `JoinedMerger` of the same merger finds it again.

    Args:
        merger: maps patches [n * G, C], in the order in which they are joined, to tokens [n, D].
        groups: G, how many patches are joined.
    """

    def __init__(self, merger: nn.Module, groups: int) -> None:
        super().__init__()
        if groups < 1:
            raise PruningError(f"groups must be at least 1, got {groups}")
        self.merger = merger
        self.groups = groups

    def forward(self, joined: Tensor) -> Tensor:
        """Map what is joined [..., G * C] to tokens [..., D]."""
        width = joined.shape[-1] // self.groups
        merged: Tensor = self.merger(joined.reshape(-1, width))
        return merged.reshape(*joined.shape[:-1], merged.shape[-1])


def weights_of(projector: nn.Module) -> nn.Module:
    """Return the module that a `WeightCache` keeps values of a projector under."""
    return projector.merger if type(projector) is JoinedMerger else projector


def two_layer(projector: nn.Module) -> TwoLayer | None:
    """Return the parts of a Linear-activation-Linear projector, None for anything else.

    A plain `nn.Sequential` is what its layers are. A module of another class, such as transformers'
    `LlavaMultiModalProjector`, is one if these are its layers and a small copy of it computes that.
    """
    layers = _chain(projector)
    plain = len(layers) == 3
    if not plain:
        layers = leaves(projector)
    if len(layers) != 3:
        return None
    first, act, second = layers
    if type(first) is not nn.Linear or type(second) is not nn.Linear or elementwise(act) is None:
        return None
    parts = TwoLayer(first, act, second)
    return parts if plain or _form(projector, layers, [None]) is not None else None


def normed_merger(projector: nn.Module) -> NormedMerger | None:
    """Return the parts of a projector that normalises, joins and has two layers, or None.

    The norm is LayerNorm or RMSNorm of each of the G patches that are joined, or, with G = 1, of
    all of them together. What a module computes is found out with a small copy of it.
    """
    layers = leaves(projector)
    if len(layers) != 4:
        return None
    layer, first, act, second = layers
    if type(first) is not nn.Linear or type(second) is not nn.Linear or elementwise(act) is None:
        return None
    norms = [norm for norm in _norms(layer) if first.in_features % norm.width == 0]
    form = _form(projector, layers, norms)
    if form is None:
        return None
    norm = norms[form]
    return NormedMerger(norm, first.in_features // norm.width, TwoLayer(first, act, second))


def linear_matrix(projector: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Return the product matrix [D, Dv] of a chain of Linear layers, None for anything else.

    As in `two_layer`, a chain may lie in a module of another class.
    """
    layers = _chain(projector)
    plain = all(type(layer) is nn.Linear for layer in layers)
    if not plain:
        layers = leaves(projector)
    if not layers or any(type(layer) is not nn.Linear for layer in layers):
        return None
    if not plain and _form(projector, layers, [None]) is None:
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


def _norms(layer: nn.Module) -> list[Norm]:
    """Return what a normalisation may be; none for another layer."""
    if type(layer) is nn.LayerNorm:
        shape = layer.normalized_shape
        return [Norm(layer, shape[0], layer.eps, centred=True)] if len(shape) == 1 else []
    weight = layer._parameters.get("weight")
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if weight is None or weight.dim() != 1 or len(layer._parameters) != 1 or layer._buffers:
        return []
    if type(layer) is nn.Linear or not isinstance(eps, float):
        return []
    return [Norm(layer, len(weight), eps, False, shift) for shift in (0.0, 1.0)]


def normalised(norm: Norm, x: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) over the last axis, without weight and bias."""
    if norm.centred:
        x = x - x.mean(dim=-1, keepdim=True)
    return x * (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()


_forms: Answers[int] = Answers()
# What the outputs of the small copy's layers are cut to.
_SMALL = 16


def _form(
    projector: nn.Module, layers: list[nn.Module], norms: Sequence[Norm | None]
) -> int | None:
    """Return the index of the norm with which the projector is its layers, one after the other.

    Args:
        projector: any module.
        layers: its `leaves`, one of them Linear.
        norms: what the first layer may be, with the patches that it takes joined after it; None
            where it is no norm.
    """

    def find() -> int | None:
        shapes: dict[int, tuple[int, ...]] = {}
        width = None
        for layer in layers:
            if type(layer) is nn.Linear:
                outputs = min(_SMALL, layer.out_features)
                shapes[id(layer.weight)] = (outputs, width or layer.in_features)
                shapes[id(layer.bias)] = (outputs,)
                width = outputs
        x = _probe(next(layer.in_features for layer in layers if type(layer) is nn.Linear), norms)
        try:
            small = small_copy(projector, shapes)
            values = small(x)
            if not isinstance(values, Tensor) or values.shape != (len(x), width):
                return None
        except Exception:  # it takes something else than tokens [n, Dv]
            return None
        wanted = [_one_after_the_other(leaves(small), norm, x) for norm in norms]
        # Some norms compute in float32 whatever their input is.
        limit = 1e-5 * values.abs().amax(dim=1)
        close = [((values - want).abs().amax(dim=1) <= limit).all() for want in wanted]
        return next((index for index, same in enumerate(close) if same), None)

    return _forms.get(projector, find) if norms else None


def _probe(width: int, norms: Sequence[Norm | None]) -> Tensor:
    """Draw float64 tokens [6, width]; for a norm, half of them so small that its eps counts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    if norms and norms[0] is not None and norms[0].eps > 0:
        x[3:] *= norms[0].eps ** 0.5
    return x


def _one_after_the_other(layers: list[nn.Module], norm: Norm | None, x: Tensor) -> Tensor:
    if norm is not None:
        norm = norm._replace(module=layers[0])
        y = normalised(norm, x.view(len(x), -1, norm.width))
        scale, offset = norm.scale(x.dtype), norm.offset(x.dtype)
        y = y if scale is None else y * scale
        y = y if offset is None else y + offset
        x, layers = y.flatten(1), layers[1:]
    for layer in layers:
        x = layer(x)
    return x


_low_rank_copies = WeightCache()


def low_rank(projector: nn.Module, rank: int) -> nn.Module:
    """Return a copy with the sensitivity of the rank-`rank` projector (ZOO-Prune on LLaVA-NeXT).

    Every Linear weight W = U S V^T is cut to its `rank` largest singular values. In a
    Linear-activation-Linear projector the last layer becomes S V^T alone: U has orthonormal
    columns, so every ||J u|| stays what it is while the output shrinks from D to `rank`.
    The copy serves sensitivities only; its outputs are not embeddings.
    """
    if type(projector) is JoinedMerger and two_layer(projector) is None:
        return JoinedMerger(low_rank(projector.merger, rank), projector.groups)
    return _low_rank_copies.get(weights_of(projector), rank, lambda: _truncated(projector, rank))


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
