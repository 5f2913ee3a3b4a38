"""Derivatives of elementwise activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_aten = torch.ops.aten

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
}

# Activations that act on every number by itself: their Jacobian is diagonal.
ELEMENTWISE = tuple(_BACKWARD)


def derivative(act: nn.Module, hidden: Tensor) -> Tensor:
    """Return act'(hidden) of an activation in ELEMENTWISE, in the type of `hidden`, any shape.

    One pass of the kernel that training uses, instead of the several of `torch.func.jvp`.
    """
    return _BACKWARD[type(act)](act, hidden.new_ones(()).expand_as(hidden), hidden)
