"""Sensitivity of mergers: a norm of every patch, G patches joined, Linear, activation, Linear.

With x = (x_1 .. x_G), x_p of width C, and n_p = gamma o (x_p - mu_p) / sigma_p + beta,

    h = sum_p W1_p n_p + b1,    M(x) = W2 act(h) + b2,    W1 = (W1_1 .. W1_G),

where mu_p is the mean of x_p (LayerNorm) or 0 (RMSNorm), sigma_p^2 = mean((x_p - mu_p)^2) + eps.
Qwen's mergers have G = 4; InternVL's projector and Qwen3-VL's deepstack mergers normalise what is
joined, which is G = 1.

**Jacobian.** Let v = (x_p - mu_p) / (sigma_p sqrt(C)) and E = I - 1 1^T / C (LayerNorm) or I
(RMSNorm), a projection with E v = v. d sigma_p / d x_p = v^T / sqrt(C), so by the quotient rule

    d n_p / d x_p = diag(gamma) (E - v v^T) / sigma_p.

s = v^T v = variance / (variance + eps) <= 1, and (E - v v^T)^2 = E - (2 - s) v v^T. With
A_p = W2 diag(g) W1_p diag(gamma), g = act'(h), the columns of J that belong to x_p are
A_p (E - v v^T) / sigma_p, hence

    ||J||_F^2 = sum_p (||A_p E||_F^2 - (2 - s_p) ||A_p v_p||^2) / sigma_p^2,
    ||A_p E||_F^2 = g^T Q_p g,   Q_p = (W2^T W2) o (B_p B_p^T),   B_p = W1_p diag(gamma) E,
    ||A_p v_p||^2 = ||R (g o w_p)||^2,   w_p = W1_p (gamma o v_p),   W2 = QR.

The w_p are the first layer, run group by group: h = sqrt(C) sum_p w_p + b1 + sum_p W1_p beta.

**Cost.** A token of Qwen2.5-VL-7B (G = 4, C = 1280, H = 5120, D = 3584) takes 26 million
multiplications for all w_p, G H^2 / 2 = 52 for the Q_p (triangles) and 48 for R. Without Q_p, A_p
alone takes G C H D = 94,000 million. One Q for all groups is not enough, because every sigma_p is
another one. The triangles are kept without most of their zeros: about 210 MiB in float32 on a CPU
and 240 MiB on an accelerator, half of that in bfloat16.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.pruning.importance.derivatives import derivative
from llava.pruning.importance.projectors import NormedMerger
from llava.pruning.importance.triangular import (
    ACCELERATOR_BLOCK,
    BLOCK,
    factor_type,
    folded_rows,
    quadratic_form,
    split_parts,
    squared_norms,
)
from llava.pruning.importance.two_layer import Tangent, blocks, triangular_factors
from llava.pruning.importance.weight_cache import WeightCache

_forms = WeightCache()


class Layers(NamedTuple):
    """A normed merger with weights in the type of its scores.

    Attributes:
        centred, eps: of the norm.
        gamma: [C], or None for ones.
        firsts: W1_p [H, C], G of them.
        origin: b1 + sum_p W1_p beta [H], the pre-activations where all normalised numbers are 0.
        act: the activation.
        second: W2 [D, H], in the type of the weights.
    """

    centred: bool
    eps: float
    gamma: Tensor | None
    firsts: tuple[Tensor, ...]
    origin: Tensor
    act: nn.Module
    second: Tensor

    def first_layer(self, x: Tensor) -> Tensor:
        """Return W1_p (gamma o x_p), [n, G, H], of x [n, G, C]."""
        scaled = x if self.gamma is None else x * self.gamma
        pairs = zip(scaled.unbind(dim=1), self.firsts, strict=True)
        return torch.stack([patch @ first.T for patch, first in pairs], dim=1)

    def centre(self, x: Tensor) -> Tensor:
        """Return x_p - mu_p, [n, G, C], of rows [n, G * C]."""
        patches = x.view(len(x), len(self.firsts), -1)
        return patches - patches.mean(dim=-1, keepdim=True) if self.centred else patches


def in_type(merger: NormedMerger, dtype: torch.dtype) -> Layers:
    """Return the weights of a merger in `dtype`: float32 or float64."""
    norm, first = merger.norm, merger.mlp.first
    weight = first.weight.detach().to(dtype)
    origin = weight.new_zeros(len(weight)) if first.bias is None else first.bias.detach().to(dtype)
    offset = norm.offset(dtype)
    if offset is not None:
        origin = origin + weight @ offset.repeat(merger.groups)
    firsts = weight.split(norm.width, dim=1)
    second = merger.mlp.second.weight.detach()
    gamma = norm.scale(dtype)
    return Layers(norm.centred, norm.eps, gamma, firsts, origin, merger.mlp.act, second)


def exact(owner: nn.Module, layers: Layers, x: Tensor, precision: str, chunk_bytes: int) -> Tensor:
    """Return ||J||_F / sqrt(G C) of every token, [N].

    As in `two_layer.exact`, products with Q_p in bfloat16 take only what g differs by from its
    value where all normalised numbers are 0.

    Args:
        owner: the module that the weights are of, see `weights_of`.
        layers: its layers in the type of `x`.
        x: [N, G * C] patches, float32 or float64.
        precision: see `product_precision`.
        chunk_bytes: the most that intermediates may take.
    """
    dtype, groups, width = x.dtype, len(layers.firsts), len(layers.origin)
    narrow = factor_type(precision, dtype)
    forms = _forms.get(owner, (dtype, narrow), lambda: _quadratic_forms(layers, narrow))
    _, factor = triangular_factors(owner, layers.second, dtype, precision)
    # Of every row: patches, centred, scaled; all w_p; h, g and the products of one group.
    row = (4 * x.shape[1] + (2 * groups + 6) * width) * x.element_size()
    squares = [
        _squares(layers, forms, factor, piece, precision)
        for piece in x.split(max(1, chunk_bytes // row))
    ]
    # Rounding may leave less than zero.
    return torch.cat(squares).clamp_min_(0).div_(x.shape[1]).sqrt_()


def _squares(
    layers: Layers,
    forms: list[tuple[list[Tensor], Tangent | None]],
    factor: Tensor,
    x: Tensor,
    precision: str,
) -> Tensor:
    """Return ||J||_F^2 of tokens, [n]."""
    patches = layers.centre(x)
    width = patches.shape[-1]
    variances = patches.square().mean(dim=-1)  # [n, G]
    precisions = (variances + layers.eps).reciprocal()  # 1 / sigma^2
    v = patches * (precisions / width).sqrt_()[..., None]
    w = layers.first_layer(v)
    g = derivative(layers.act, w.sum(dim=1).mul_(width**0.5).add_(layers.origin))
    total = torch.zeros_like(g[:, 0])
    for group, (folded, tangent) in enumerate(forms):
        if tangent is None:
            whole = quadratic_form(g, folded, precision)
        else:
            d = g - tangent.centre
            linear = d @ tangent.slope + tangent.constant
            whole = quadratic_form(d, folded, precision) + linear
        along = squared_norms(split_parts(g * w[:, group], precision), factor, x.dtype)
        weight = precisions[:, group]
        total += weight * (whole - (2 - variances[:, group] * weight) * along)
    return total


def _quadratic_forms(
    layers: Layers, narrow: torch.dtype
) -> list[tuple[list[Tensor], Tangent | None]]:
    """Return for every group Q_p in blocks, see `folded_rows`, and what is added if they round."""
    dtype, device = layers.origin.dtype, layers.origin.device
    outers = []
    for first in layers.firsts:
        scaled = first if layers.gamma is None else first * layers.gamma
        outers.append(scaled - scaled.mean(dim=1, keepdim=True) if layers.centred else scaled)
    centre = derivative(layers.act, layers.origin)
    slopes = [torch.zeros_like(centre) for _ in outers]
    folded: list[list[Tensor]] = [[] for _ in outers]
    block, start = BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK, 0
    for made in folded_rows(outers, layers.second.to(dtype), block):
        stop = start + len(made[0])
        for rows, slope, kept in zip(made, slopes, folded, strict=True):
            slope[start:stop] += rows @ centre[start:]
            slope[start:] += centre[start:stop] @ rows
            kept.append(rows.to(narrow))
        start = stop
    if narrow == dtype:
        return [(kept, None) for kept in folded]
    return [
        (kept, Tangent(centre, slope, slope @ centre / 2))
        for kept, slope in zip(folded, slopes, strict=True)
    ]


def zeroth_order(
    owner: nn.Module,
    layers: Layers,
    x: Tensor,
    bank: Tensor,
    step: float,
    precision: str,
    chunk_bytes: int,
) -> Tensor:
    """Return eq. 4 of every token, [N], with one bank of directions for all tokens.

    The norm of x_p + t u_p, t = -h or h, needs three numbers of every group: with centred x_p, u_p

        sigma_p(t)^2 = sigma_p^2 + D_p,   D_p = 2 t mean(x_p o u_p) + t^2 mean(u_p^2).

    So the first layer runs once per token, a_p = W1_p (gamma o x_p), and once per direction,
    b_p = W1_p (gamma o u_p), and what a nudge adds to the pre-activations is

        sum_p (1 / sigma_p(t) - 1 / sigma_p) a_p + t b_p / sigma_p(t),

    where the first bracket is -D_p / (sigma_p sigma_p(t) (sigma_p + sigma_p(t))), free of
    cancellation. b2 cancels, and the second layer is R, applied to the difference of activations.
    Qwen2.5-VL-7B: 12 million multiplications per token and direction, 89 as a black box.

    Args:
        owner, layers, x, precision, chunk_bytes: as in `exact`.
        bank: [m, G * C] directions in the type of `x`.
        step: h.
    """
    groups, width = len(layers.firsts), len(layers.origin)
    directions = layers.centre(bank)
    moves = layers.first_layer(directions)  # [m, G, H]
    _, factor = triangular_factors(owner, layers.second, x.dtype, precision)
    row = (4 * x.shape[1] + (2 * groups + 3) * width + 8 * groups * len(bank)) * x.element_size()
    # Of every row and direction: two nudges, two activations, the parts of their difference.
    rows = chunk_bytes // (8 * max(width, len(factor)) * x.element_size())
    scores = []
    for piece in x.split(max(1, chunk_bytes // row)):
        squares = piece.new_empty(len(piece), len(bank))
        for tokens, lanes, moved in _differences(layers, piece, directions, moves, step, rows):
            norms = squared_norms(split_parts(moved, precision), factor, x.dtype)
            squares[tokens, lanes] = norms.view_as(squares[tokens, lanes])
        scores.append(squares.sqrt_().mean(dim=1).div_(2 * step))
    return torch.cat(scores)


def _differences(
    layers: Layers, x: Tensor, directions: Tensor, moves: Tensor, step: float, rows: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (tokens, directions, act(h + nudge) - act(h - nudge) [t * l, H]), see `zeroth_order`.

    Args:
        layers: the merger's.
        x: [n, G * C].
        directions: [m, G, C], centred.
        moves: b [m, G, H].
        step: h.
        rows: the most that t * l may be.
    """
    patches = layers.centre(x)
    variance = patches.square().mean(dim=-1)[:, None]  # [n, 1, G]
    sigma = (variance + layers.eps).sqrt()
    products = torch.einsum("ngc,mgc->nmg", patches, directions) / patches.shape[-1]
    lengths = directions.square().mean(dim=-1)  # [m, G]
    ran = layers.first_layer(patches)  # a [n, G, H]
    hidden = (ran / sigma[:, 0, :, None]).sum(dim=1).add_(layers.origin)
    for tokens, lanes in blocks(len(x), len(directions), rows):
        sides = []
        for nudge in (step, -step):
            change = 2 * nudge * products[tokens, lanes] + nudge**2 * lengths[lanes]
            # A variance is never negative, whatever rounding makes of it.
            there = ((variance[tokens] + change).clamp_min_(0) + layers.eps).sqrt_()
            at = sigma[tokens]
            added = (-change / (at * there * (at + there))) @ ran[tokens]
            pairs = (nudge / there).transpose(0, 1) @ moves[lanes]  # [l, t, H]
            added += pairs.transpose(0, 1)
            sides.append(layers.act(added.add_(hidden[tokens, None])))
        yield tokens, lanes, (sides[0] - sides[1]).flatten(0, 1)
