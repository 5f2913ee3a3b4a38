"""Kernels of the closed-form sensitivity: derivatives and g^T Q g against float64."""

from __future__ import annotations

import kernel_cases as cases
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.triton

ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def derivative(hidden: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    from llava.pruning.kernels.quadratic import activation_derivative

    return activation_derivative(hidden.to(cases.DEVICE), kind, dtype).cpu()


def form(g: Tensor, q: Tensor, width: int | None = None) -> Tensor:
    from llava.pruning.kernels.quadratic import quadratic_form

    return quadratic_form(g.to(cases.DEVICE), q.to(cases.DEVICE), width).cpu()


def exact_derivative(hidden: Tensor, kind: str) -> Tensor:
    """float64, by automatic differentiation."""
    x = hidden.double()
    return torch.func.jvp(ACTIVATIONS[kind], (x,), (torch.ones_like(x),))[1]


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g [rows, hidden] and a positive definite q [hidden, hidden] in `dtype`."""
    generator = torch.Generator().manual_seed(hidden)
    half = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    q = (half @ half.T / hidden).to(dtype)
    return torch.randn(rows, hidden, generator=generator).to(dtype), q


def exact_form(g: Tensor, q: Tensor) -> Tensor:
    return ((g.double() @ q.double()) * g.double()).sum(dim=1)


def test_kinds_are_told_apart() -> None:
    from llava.pruning.kernels.quadratic import derivative_kind

    for kind, act in ACTIVATIONS.items():
        assert derivative_kind(act) == kind
    assert derivative_kind(nn.Tanh()) is None
    assert derivative_kind(type("Scaled", (nn.SiLU,), {})()) is None


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_derivatives(kind: str) -> None:
    hidden = torch.cat([torch.linspace(-12, 12, 3000), torch.tensor([-1e4, -0.0, 0.0, 1e4])])[None]
    error = (derivative(hidden, kind) - exact_derivative(hidden, kind)).abs().max()
    assert error < 5e-7
    # Rounded once.
    for dtype in (torch.bfloat16, torch.float16):
        got = derivative(hidden.to(dtype), kind, dtype)
        want = exact_derivative(hidden.to(dtype), kind)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_passes_through_a_derivative(kind: str) -> None:
    got = derivative(torch.tensor([[0.5, torch.nan]]), kind)[0]
    assert got[0].isfinite()
    assert got[1].isnan()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 16), (65, 100), (70, 256), (1, 300)])
def test_form(rows: int, hidden: int, dtype: torch.dtype) -> None:
    g, q = inputs(rows, hidden, dtype)
    want = exact_form(g, q)
    got = form(g, q)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
    root = form(g, q, width=24)
    torch.testing.assert_close(root.double(), (want / 24).sqrt(), rtol=2e-5, atol=0)


def test_below_zero_is_zero_and_nan_stays_in_its_row() -> None:
    g, q = inputs(5, 100, torch.float32)
    assert (form(g, -q) < 0).all()
    assert (form(g, -q, width=8) == 0).all()
    want = form(g, q, width=8)
    g[3, 7] = torch.nan
    got = form(g, q, width=8)
    assert got[3].isnan()
    rest = [0, 1, 2, 4]
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    g, q = inputs(70, 256, dtype)
    together = form(g, q)
    assert torch.equal(form(g[3:67], q), together[3:67])
    if cases.DEVICE == "cuda":  # NumPy, in the interpreter, sums by the shape of a block
        assert torch.equal(form(g[69:], q), together[69:])


def test_no_rows() -> None:
    _, q = inputs(1, 16, torch.float32)
    assert form(torch.empty(0, 16), q).shape == (0,)
    assert derivative(torch.empty(0, 16), "gelu").shape == (0, 16)


def test_wrong_results_are_noticed() -> None:
    """One triangle counted once, the diagonal counted twice: both are far outside the bounds."""
    g, q = inputs(65, 100, torch.float32)
    want = exact_form(g, q)
    for wrong in (exact_form(g, q.triu()), exact_form(g, q + q.diag().diag())):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, want, rtol=2e-5, atol=0)
