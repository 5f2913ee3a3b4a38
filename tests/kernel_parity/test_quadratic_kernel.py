"""Kernels of the closed-form sensitivity: derivatives and g^T Q g against float64."""

from __future__ import annotations

import copy
from typing import Any

import kernel_cases as cases
import pytest
import torch
from torch import Tensor, nn

from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.importance.triangular import fold

pytestmark = pytest.mark.triton

ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
}
PRECISIONS = {"float32": 2e-5, "split": 2e-5, "bf16": 2e-2}


def derivative(hidden: Tensor, kind: str, centre: Tensor | None = None) -> Tensor:
    from llava.pruning.kernels.quadratic import activation_derivative

    return activation_derivative(cases.on_device(hidden), kind, cases.on_device(centre)).cpu()


def form(g: Tensor, folded: Tensor, precision: str = "float32", **added: Any) -> Tensor:
    from llava.pruning.kernels.quadratic import quadratic_form

    added = {k: cases.on_device(v) if isinstance(v, Tensor) else v for k, v in added.items()}
    return quadratic_form(cases.on_device(g), cases.on_device(folded), precision, **added).cpu()


def exact_derivative(hidden: Tensor, kind: str) -> Tensor:
    """float64, by automatic differentiation."""
    x = hidden.double()
    return torch.func.jvp(ACTIVATIONS[kind], (x,), (torch.ones_like(x),))[1]


def inputs(rows: int, hidden: int, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """g [rows, hidden], and U [hidden, hidden] of a positive definite Q, in the product's type."""
    generator = torch.Generator().manual_seed(hidden)
    weights = torch.randn(2, hidden, hidden, generator=generator, dtype=torch.float64)
    folded = fold(weights[0], weights[1] / hidden)
    narrow = torch.float32 if precision == "float32" else torch.bfloat16
    return torch.randn(rows, hidden, generator=generator), folded.to(narrow)


def exact_form(g: Tensor, folded: Tensor) -> Tensor:
    return ((g.double() @ folded.double()) * g.double()).sum(dim=1)


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
    assert error < (2e-6 if cases.DEVICE == "cuda" else 5e-7)  # exp is approximate there
    centre = torch.linspace(-1, 1, hidden.shape[1])
    moved = derivative(hidden, kind, centre) - (derivative(hidden, kind) - centre)
    assert moved.abs().max() < 1e-6
    half = hidden.bfloat16()
    assert torch.equal(derivative(half, kind), derivative(half.float(), kind))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_passes_through_a_derivative(kind: str) -> None:
    got = derivative(torch.tensor([[0.5, torch.nan]]), kind)[0]
    assert got[0].isfinite()
    assert got[1].isnan()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 16), (65, 100), (70, 256), (1, 300)])
def test_form(rows: int, hidden: int, precision: str) -> None:
    """Against float64, and, where g is rounded for the products, against that."""
    g, folded = inputs(rows, hidden, precision)
    want, bound = exact_form(g, folded), PRECISIONS[precision]
    got = form(g, folded, precision)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * float(want.abs().max()))
    if precision == "bf16" and cases.DEVICE == "cuda":  # the interpreter cuts off, not rounds
        rounded = ((g.bfloat16().double() @ folded.double()) * g.double()).sum(dim=1)
        torch.testing.assert_close(got.double(), rounded, rtol=1e-4, atol=1e-4)
    slope, constant = torch.linspace(-1, 1, hidden), torch.tensor(0.5)
    got = form(g, folded, precision, slope=slope, constant=constant, width=24)
    want = want + g.double() @ slope.double() + 0.5
    want = (want.clamp_min(0) / 24).sqrt()
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * float(want.max()))


def test_below_zero_is_zero_and_nan_stays_in_its_row() -> None:
    g, folded = inputs(5, 100)
    assert (form(g, -folded) < 0).all()
    assert (form(g, -folded, width=8) == 0).all()
    want = form(g, folded, width=8)
    g[3, 7] = torch.nan
    got = form(g, folded, width=8)
    assert got[3].isnan()
    rest = [0, 1, 2, 4]
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_alone_and_in_a_batch(precision: str) -> None:
    g, folded = inputs(70, 256, precision)
    together = form(g, folded, precision)
    assert torch.equal(form(g[3:67], folded, precision), together[3:67])
    if cases.DEVICE == "cuda":  # NumPy, in the interpreter, sums by the shape of a block
        assert torch.equal(form(g[69:], folded, precision), together[69:])


def test_no_rows() -> None:
    _, folded = inputs(1, 16)
    assert form(torch.empty(0, 16), folded).shape == (0,)
    assert derivative(torch.empty(0, 16), "gelu").shape == (0, 16)


def test_wrong_results_are_noticed() -> None:
    """One triangle counted half, the diagonal counted twice: both are far outside the bounds."""
    g, folded = inputs(65, 100)
    want, diagonal = exact_form(g, folded), folded.diag().diag()
    bound = {"rtol": 1e-4, "atol": 1e-4 * float(want.abs().max())}
    for wrong in ((folded + diagonal) / 2, folded + diagonal):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(exact_form(g, wrong), want, **bound)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("compute", ["bf16", "split"])
def test_exact_sensitivity(kind: str, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sensitivity` goes through the kernels, and gives what it gives in float64 without them."""
    from llava.pruning.kernels import quadratic

    generator = torch.Generator().manual_seed(1)
    projector = nn.Sequential(nn.Linear(24, 100), ACTIVATIONS[kind], nn.Linear(100, 40))
    with torch.no_grad():
        for weight in projector.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    features = torch.randn(2, 70, 24, generator=generator)
    with cases.without_kernels():
        exact = copy.deepcopy(projector).double()
        want = sensitivity(exact, features.double(), estimator="exact").float()
    calls = []
    launch = quadratic.quadratic_form
    monkeypatch.setattr(
        quadratic, "quadratic_form", lambda *a, **k: calls.append(1) or launch(*a, **k)
    )
    got = sensitivity(
        projector.to(cases.DEVICE), cases.on_device(features), estimator="exact", compute=compute
    )
    assert len(calls) == 2
    torch.testing.assert_close(got.cpu(), want, rtol=2e-2, atol=0)
    assert (got.cpu() / want - 1).square().mean() < 4e-6
