"""Derivatives of elementwise activations."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.importance.structure import Answers

_aten = torch.ops.aten


class QuickGELU(nn.Module):
    """Compute h sigmoid(1.702 h), CLIP's approximation of GELU."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.702 * h)


def _quick_gelu_backward(one: Tensor, h: Tensor) -> Tensor:
    share = torch.sigmoid(1.702 * h)
    return one * (share + 1.702 * h * share * (1 - share))


# The derivative at h, times the first argument. Modules are typed Any: their settings differ.
_BACKWARD: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.ELU: lambda act, one, h: _aten.elu_backward(one, act.alpha, 1, 1, False, h),
    nn.GELU: lambda act, one, h: _aten.gelu_backward(one, h, approximate=act.approximate),
    nn.Hardswish: lambda act, one, h: _aten.hardswish_backward(one, h),
    nn.LeakyReLU: lambda act, one, h: _aten.leaky_relu_backward(one, h, act.negative_slope, False),
    nn.Mish: lambda act, one, h: _aten.mish_backward(one, h),
    nn.ReLU: lambda act, one, h: _aten.threshold_backward(one, h, 0),
    nn.Sigmoid: lambda act, one, h: _aten.sigmoid_backward(one, h.sigmoid()),
    nn.SiLU: lambda act, one, h: _aten.silu_backward(one, h),
    nn.Softplus: lambda act, one, h: _aten.softplus_backward(one, h, act.beta, act.threshold),
    nn.Tanh: lambda act, one, h: _aten.tanh_backward(one, h.tanh()),
    QuickGELU: lambda act, one, h: _quick_gelu_backward(one, h),
}

# Activations that act on every number by itself: their Jacobian is diagonal.
ELEMENTWISE = tuple(_BACKWARD)

# What an activation of another class is compared with: transformers has its own classes.
_TWINS = (
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.ReLU(),
    QuickGELU(),
    nn.Mish(),
    nn.Tanh(),
    nn.Sigmoid(),
)


def elementwise(act: nn.Module) -> nn.Module | None:
    """Return the activation of ELEMENTWISE that computes the same; None if there is none.

    One of another class, such as transformers' `GELUActivation`, is compared with some of them on a
    grid of float64 numbers between -8 and 8; 1e-9 apart is the same.
    """
    if type(act) in _BACKWARD:
        return act
    if act._modules or act._parameters or act._buffers:
        return None
    return _found.get(act, lambda: _twin(act))


_found: Answers[nn.Module] = Answers()


def _twin(act: nn.Module) -> nn.Module | None:
    grid = torch.linspace(-8, 8, 1025, dtype=torch.float64, device="cpu").view(41, 25)
    module = copy.deepcopy(act).eval()
    try:
        values, turned = module(grid.clone()), module(grid.flip(0, 1))
    except Exception:  # it takes something else than numbers: no activation
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    if not torch.allclose(turned, values.flip(0, 1), rtol=1e-12, atol=1e-12):
        return None  # a number's place matters
    alike = (twin for twin in _TWINS if torch.allclose(values, twin(grid), rtol=1e-9, atol=1e-9))
    return next(alike, None)


def derivative(act: nn.Module, hidden: Tensor) -> Tensor:
    """Return act'(hidden) of an activation that `elementwise` knows, in the type of `hidden`.

    One pass of the kernel that training uses, instead of the several of `torch.func.jvp`.

    Args:
        act: the activation.
        hidden: any shape.
    """
    known = elementwise(act)
    assert known is not None  # whoever calls has asked `elementwise`
    return _BACKWARD[type(known)](known, hidden.new_ones(()).expand_as(hidden), hidden)
