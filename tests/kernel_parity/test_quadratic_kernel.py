"""Kernels of the closed-form sensitivity: derivatives and g^T Q g against float64."""

from __future__ import annotations

from typing import Any

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


def derivative(
    hidden: Tensor,
    kind: str,
    dtype: torch.dtype = torch.float32,
    centre: Tensor | None = None,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from llava.pruning.kernels.quadratic import centred_derivative

    nothing = torch.zeros(hidden.shape[1])
    given = (nothing if vector is None else vector for vector in (centre, slope))
    centre, slope = (vector.to(cases.DEVICE) for vector in given)
    made, linear = centred_derivative(hidden.to(cases.DEVICE), kind, centre, slope, dtype)
    return made.cpu(), linear.cpu()


def form(d: Tensor, u: Tensor, **more: Any) -> Tensor:
    from llava.pruning.kernels.quadratic import quadratic_form

    more = {key: v.to(cases.DEVICE) if isinstance(v, Tensor) else v for key, v in more.items()}
    return quadratic_form(d.to(cases.DEVICE), u.to(cases.DEVICE), **more).cpu()


def exact_derivative(hidden: Tensor, kind: str) -> Tensor:
    """float64, by automatic differentiation."""
    x = hidden.double()
    return torch.func.jvp(ACTIVATIONS[kind], (x,), (torch.ones_like(x),))[1]


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """d [rows, hidden] and, folded, a positive definite matrix [hidden, hidden] in `dtype`."""
    generator = torch.Generator().manual_seed(hidden)
    half = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    q = half @ half.T / hidden
    u = (2 * q.triu() - q.diag().diag()).to(dtype)
    return torch.randn(rows, hidden, generator=generator).to(dtype), u


def exact_form(d: Tensor, u: Tensor) -> Tensor:
    return ((d.double() @ u.double()) * d.double()).sum(dim=1)


def test_kinds_are_told_apart() -> None:
    from llava.pruning.kernels.quadratic import derivative_kind

    for kind, act in ACTIVATIONS.items():
        assert derivative_kind(act) == kind
    assert derivative_kind(nn.Tanh()) is None
    assert derivative_kind(type("Scaled", (nn.SiLU,), {})()) is None


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_derivatives(kind: str) -> None:
    hidden = torch.cat([torch.linspace(-12, 12, 3000), torch.tensor([-1e4, -0.0, 0.0, 1e4])])[None]
    error = (derivative(hidden, kind)[0] - exact_derivative(hidden, kind)).abs().max()
    assert error < 5e-7
    # Rounded once.
    for dtype in (torch.bfloat16, torch.float16):
        got, _ = derivative(hidden.to(dtype), kind, dtype)
        want = exact_derivative(hidden.to(dtype), kind)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_passes_through_a_derivative(kind: str) -> None:
    (got,), _ = derivative(torch.tensor([[0.5, torch.nan]]), kind)
    assert got[0].isfinite()
    assert got[1].isnan()


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_derivatives_less_their_centre(width: int) -> None:
    """What is multiplied with the slope is not rounded."""
    generator = torch.Generator().manual_seed(width)
    hidden, centre, slope = (torch.randn(n, width, generator=generator) for n in (3, 1, 1))
    want = exact_derivative(hidden, "gelu") - centre.double()
    got, linear = derivative(hidden, "gelu", torch.bfloat16, centre[0], slope[0])
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    along = (want * slope.double()).sum(dim=1)
    torch.testing.assert_close(linear.double(), along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 16), (65, 100), (70, 256), (1, 300)])
def test_form(rows: int, hidden: int, dtype: torch.dtype) -> None:
    d, u = inputs(rows, hidden, dtype)
    want = exact_form(d, u)
    got = form(d, u)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want.sqrt(), rtol=2e-5, atol=0)
    linear, constant = torch.rand(rows), torch.tensor(0.5)
    moved = form(d, u, linear=linear, constant=constant, width=24)
    want = ((want + linear.double() + 0.5) / 24).sqrt()
    torch.testing.assert_close(moved.double(), want, rtol=2e-5, atol=0)


def test_below_the_diagonal_nothing_is_read() -> None:
    d, u = inputs(5, 300, torch.float32)
    garbage = torch.full_like(u, torch.nan).tril(-1)
    assert torch.equal(form(d, torch.where(garbage.isnan(), garbage, u)), form(d, u))


def test_below_zero_is_zero_and_nan_stays_in_its_row() -> None:
    d, u = inputs(5, 100, torch.float32)
    assert (form(d, -u) == 0).all()
    want = form(d, u)
    d[3, 7] = torch.nan
    got = form(d, u)
    assert got[3].isnan()
    rest = [0, 1, 2, 4]
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    d, u = inputs(70, 256, dtype)
    together = form(d, u)
    assert torch.equal(form(d[3:67], u), together[3:67])
    if cases.DEVICE == "cuda":  # NumPy, in the interpreter, sums by the shape of a block
        assert torch.equal(form(d[69:], u), together[69:])


def test_no_rows() -> None:
    _, u = inputs(1, 16, torch.float32)
    assert form(torch.empty(0, 16), u).shape == (0,)
    assert derivative(torch.empty(0, 16), "gelu")[0].shape == (0, 16)


def test_the_kernel_scores_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 products `sensitivity` comes about as near to float64 with kernels as without."""
    from llava.pruning.importance import sensitivity as module

    generator = torch.Generator().manual_seed(3)
    projector = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 40))
    with torch.no_grad():
        for weight in projector.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    projector = projector.bfloat16().to(cases.DEVICE)
    features = torch.randn(3, 50, 24, generator=generator).bfloat16().to(cases.DEVICE)
    with torch.no_grad():
        hidden = [*projector[0](features)]
    given = {"estimator": "exact", "compute": "bf16", "hidden": hidden}
    got = module.sensitivity(projector, features, **given)
    monkeypatch.setattr(module, "usable", lambda *_: False)
    want = module.sensitivity(projector, features, **given)
    exact = module.sensitivity(
        projector.double(),
        features.double(),
        estimator="exact",
        hidden=[h.double() for h in hidden],
    )
    assert not torch.equal(got, want)  # they are two ways
    errors = [((scores - exact).abs() / exact).max() for scores in (got, want)]
    # The kernel rounds both factors of a square, torch one. Triton's interpreter cuts bfloat16 off
    # where a GPU rounds.
    assert errors[0] <= (5e-3 if cases.DEVICE == "cpu" else 2.5 * errors[1])
    assert errors[1] < 1e-3


def test_wrong_results_are_noticed() -> None:
    """The other triangle missing, the diagonal counted twice: both are far outside the bounds."""
    d, u = inputs(65, 100, torch.float32)
    want = exact_form(d, u)
    for wrong in (exact_form(d, u / 2), exact_form(d, u + u.diag().diag())):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, want, rtol=2e-5, atol=0)
