"""Sensitivity of any projector, from calls of it alone."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava.pruning.importance.structure import without_readers
from llava.pruning.importance.two_layer import blocks

# Up to this input width an unknown projector is differentiated along every axis.
BASIS_WIDTH = 256

Function = Callable[[Tensor], Tensor]


def black_box(
    projector: nn.Module, bank: Tensor, step: float, dtype: torch.dtype, chunk_bytes: int
) -> Function:
    """Score by eq. 4 as written, for any projector: two passes per token and direction."""
    function = _as_function(projector, dtype)

    def score(x: Tensor) -> Tensor:
        widest = _widest(projector, x)
        return _norms(_difference(function, step), x, bank, widest, chunk_bytes).mean(dim=1)

    return score


def as_released(
    projector: nn.Module, bank: Tensor, step: float, dtype: torch.dtype, chunk_bytes: int
) -> Function:
    """Score by eq. 4 in `dtype`, rounded wherever ZOO-Prune's released code rounds."""
    function = _as_function(projector, dtype)
    bank = bank / (bank.norm(dim=1, keepdim=True) + 1e-12)

    def move(at: Tensor, direction: Tensor) -> Tensor:
        nudge = step * direction
        return function(at + nudge) - function(at - nudge)

    def score(x: Tensor) -> Tensor:
        return (_norms(move, x, bank, _widest(projector, x), chunk_bytes) / (2 * step)).mean(dim=1)

    return score


def forward_mode(
    projector: nn.Module, bank: Tensor, step: float, dtype: torch.dtype, chunk_bytes: int
) -> Function:
    """Score by ||J||_F / sqrt(Dv) of any projector from directional derivatives J u."""
    function = _as_function(projector, dtype)
    width = bank.shape[1]
    if width <= BASIS_WIDTH:
        bank, dimensions = torch.eye(width, dtype=dtype, device=bank.device), width
    else:
        dimensions = bank.shape[0]  # E ||J u||^2 = ||J||_F^2 / Dv for unit u

    def derivative(at: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(function, (at,), (direction.expand_as(at).clone(),))[1]

    def score(x: Tensor) -> Tensor:
        widest = _widest(projector, x)
        try:
            norms = _norms(derivative, x, bank, widest, chunk_bytes)
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            norms = _norms(_difference(function, step), x, bank, widest, chunk_bytes)
        return norms.square().sum(dim=1).div(dimensions).sqrt()

    return score


def _norms(
    move: Callable[[Tensor, Tensor], Tensor], x: Tensor, bank: Tensor, wide: int, chunk_bytes: int
) -> Tensor:
    """Return ||move(x_i, u_j)||, [N, m], in chunks with intermediates of `chunk_bytes` at most.

    move maps points [r, E] and directions [r, E] to vectors [r, D]; it needs up to four
    intermediates of `wide` numbers a row at a time.
    """
    rows = chunk_bytes // (4 * wide * x.element_size())
    norms = x.new_empty(x.shape[0], len(bank))
    for tokens, lanes in blocks(x.shape[0], len(bank), rows):
        at, direction = torch.broadcast_tensors(x[tokens, None], bank[None, lanes])
        moved = move(at.flatten(0, 1), direction.flatten(0, 1))
        norms[tokens, lanes] = moved.norm(dim=1).view(at.shape[:2])
    return norms


def _difference(function: Function, step: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the central difference (M(x + h u) - M(x - h u)) / 2h as a function of x and u."""

    def move(at: Tensor, direction: Tensor) -> Tensor:
        nudge = step * direction
        return (function(at + nudge) - function(at - nudge)) / (2 * step)

    return move


def _as_function(projector: nn.Module, dtype: torch.dtype) -> Function:
    """Return the projector outside training as a function in `dtype`; the module is unchanged.

    The function is a copy with weights of its own type: another thread may be using the module.
    """
    memo = without_readers(projector)
    for weight in projector.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    for buffer in projector.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(projector, memo).eval()


def _widest(projector: nn.Module, x: Tensor) -> int:
    """Count the numbers in the widest intermediate of one token."""
    sides = [side for p in projector.parameters() for side in p.shape]
    return max([x.shape[-1], *sides])
