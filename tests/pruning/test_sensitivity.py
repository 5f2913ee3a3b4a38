"""Sensitivity beyond the goldens: other projectors, caching, statistics, numerics."""

from __future__ import annotations

import gc
import weakref

import pruning_checks as checks
import pytest
import torch
from torch import nn

from llava.pruning import PruningError, sensitivity
from llava.pruning.importance import sensitivity as module
from llava.pruning.importance.normalise import min_max
from llava.pruning.importance.sensitivity import direction_bank
from llava.pruning.importance.weight_cache import WeightCache

ACTIVATIONS = [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh()]


def mlp(*layers: nn.Module) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    projector = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in projector.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
    return projector


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd_frobenius(projector: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """||J||_F / sqrt(Dv) from reverse-mode Jacobians, token by token."""
    norms = [torch.autograd.functional.jacobian(projector, row).norm() for row in x]
    return torch.stack(norms) / x.shape[1] ** 0.5


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_shortcut_equals_black_box(act, monkeypatch) -> None:
    projector, x = mlp(nn.Linear(8, 20), act, nn.Linear(20, 12)), tokens(2, 15, 8)
    short = sensitivity(projector, x)
    monkeypatch.setattr(module, "two_layer", lambda projector: None)
    torch.testing.assert_close(short, sensitivity(projector, x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_closed_form_equals_autograd(act) -> None:
    projector, x = mlp(nn.Linear(8, 20), act, nn.Linear(20, 12)), tokens(15, 8)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, autograd_frobenius(projector, x), rtol=1e-9, atol=0)


def test_deeper_and_unusual_projectors_use_forward_mode() -> None:
    deep = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 12))
    normed = mlp(nn.LayerNorm(8), nn.Linear(8, 20, bias=False), nn.SiLU(), nn.Linear(20, 6))
    for projector in (deep, normed):
        x = tokens(15, 8)
        got = sensitivity(projector, x, estimator="exact")
        torch.testing.assert_close(got, autograd_frobenius(projector, x), rtol=1e-9, atol=0)


def test_wide_unknown_projector_is_estimated_on_the_bank(monkeypatch) -> None:
    monkeypatch.setattr("llava.pruning.importance.black_box.BASIS_WIDTH", 4)
    deep = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 12))
    x = tokens(15, 8)
    got = sensitivity(deep, x, estimator="exact", directions=4000)
    torch.testing.assert_close(got, autograd_frobenius(deep, x), rtol=0.03, atol=0)


class Opaque(torch.autograd.Function):
    """tanh without a forward-mode rule."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OpaqueTanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Opaque.apply(x)


def test_no_forward_mode_rule_falls_back_to_differences() -> None:
    projector = mlp(nn.Linear(8, 20), OpaqueTanh(), nn.Linear(20, 12))
    twin = mlp(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 12))
    x = tokens(15, 8)
    got = sensitivity(projector, x, estimator="exact", step=1e-4)
    torch.testing.assert_close(got, autograd_frobenius(twin, x), rtol=1e-6, atol=0)


def test_an_error_of_the_projector_is_not_swallowed() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        sensitivity(Broken(), tokens(3, 4), estimator="exact")


@pytest.mark.parametrize("estimator", ["zeroth_order", "exact"])
@pytest.mark.parametrize("layers", [1, 2])
def test_linear_projectors_are_constant(estimator, layers) -> None:
    chain = [nn.Linear(8, 20), nn.Linear(20, 12)][:layers]
    projector = mlp(*chain) if layers == 2 else mlp(*chain)[0]
    s = sensitivity(projector, tokens(15, 8), estimator=estimator)
    assert s.unique().numel() == 1
    assert (min_max(s) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_near_constant_sensitivity_becomes_weight_one(dtype) -> None:
    class Identity(nn.Module):  # not recognised: the black box sees rounding noise
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.0

    s = sensitivity(Identity(), tokens(40, 64).to(dtype))
    assert s.dtype == torch.float32
    assert (min_max(s) == 1).all()


def test_estimator_is_unbiased_for_the_squared_norm() -> None:
    """E ||J u||^2 = ||J||_F^2 / Dv within three standard errors; Jensen for the mean of norms."""
    j = tokens(24, 16, seed=8)
    count = 100_000
    squares = (direction_bank(5, 16, count).double() @ j.T).square().sum(dim=1)
    want = float(j.square().sum()) / 16
    error = float(squares.std()) / count**0.5
    assert abs(float(squares.mean()) - want) < 3 * error
    projector = nn.Linear(16, 24).double()
    projector.weight.data = j
    exact = sensitivity(projector, tokens(3, 16), estimator="exact")
    mean = sensitivity(projector, tokens(3, 16), directions=count, seed=5)
    assert (exact - want**0.5).abs().max() < 1e-12
    assert (mean < exact).all()
    assert float((mean / exact).min()) > 0.9


def test_jensen_is_an_equality_for_a_conformal_map() -> None:
    q, _ = torch.linalg.qr(tokens(16, 16, seed=2))
    projector = nn.Linear(16, 16).double()
    projector.weight.data = 2 * q
    exact = sensitivity(projector, tokens(3, 16), estimator="exact")
    mean = sensitivity(projector, tokens(3, 16))
    torch.testing.assert_close(mean, exact, rtol=1e-6, atol=0)


def test_direction_bank_is_a_pure_function() -> None:
    bank = direction_bank(3, 10, 6)
    assert bank.dtype == torch.float32
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(6))
    torch.manual_seed(99)
    direction_bank.cache_clear()
    direction_bank(1, 2, 3)
    assert torch.equal(direction_bank(3, 10, 6), bank)
    assert not torch.equal(direction_bank(4, 10, 6), bank)


def test_chunking_changes_nothing(monkeypatch) -> None:
    projector = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 12))
    deep = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 12))
    x = tokens(2, 15, 8)
    runs = []
    for size in (2**28, 4 * 20 * 8 * 50, 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        runs.append([sensitivity(p, x, directions=7) for p in (projector, deep)])
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("estimator", ["zeroth_order", "exact"])
@pytest.mark.parametrize("rows", [5, 7])
def test_rows_score_the_same_alone(estimator, rows) -> None:
    visual = checks.make_visual(rows, seed=1)
    x = visual.features[:, :31]  # an odd shape, so rows start at odd offsets
    batch = sensitivity(visual.projector, x, estimator=estimator)
    for row in range(rows):
        alone = sensitivity(visual.projector, x[row].clone(), estimator=estimator)
        assert torch.equal(batch[row], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["zeroth_order", "exact"])
def test_half_precision_is_computed_in_float32(dtype, estimator) -> None:
    visual = checks.make_visual(1, dtype=dtype)
    arguments = {"estimator": estimator, "compute": "float32"}
    got = sensitivity(visual.projector, visual.features, **arguments)
    want = sensitivity(visual.projector.double(), visual.features.double(), estimator=estimator)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[0].weight.data.mul_(2),
        lambda p: nn.init.constant_(p[2].weight, 0.3),
        lambda p: p.load_state_dict({k: v * 3 for k, v in p.state_dict().items()}),
        lambda p: setattr(p[0], "weight", nn.Parameter(p[0].weight * 2)),
        lambda p: setattr(p[0].weight, "data", p[0].weight.data * 2),
    ],
    ids=["in place through .data", "initialiser", "load_state_dict", "new Parameter", "new .data"],
)
def test_cache_forgets_changed_weights(change) -> None:
    projector, x = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 12)), tokens(15, 8)
    before = sensitivity(projector, x, estimator="exact")
    assert torch.equal(before, sensitivity(projector, x, estimator="exact"))
    change(projector)
    after = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(after, autograd_frobenius(projector, x), rtol=1e-9, atol=0)


def test_cache_computes_once_and_dies_with_the_module() -> None:
    cache, calls = WeightCache(), []
    projector = nn.Linear(3, 3)
    for _ in range(3):
        cache.get(projector, "q", lambda: calls.append(1))
    assert len(calls) == 1
    reference = weakref.ref(projector)
    del projector
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "autograd"}, "zeroth_order, exact"),
        ({"directions": 0}, "at least 1"),
        ({"directions": torch.ones(3, 5)}, r"\[m, 8\]"),
        ({"step": 0.0}, "positive"),
        ({"step": float("nan")}, "positive"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(PruningError, match=message):
        sensitivity(nn.Linear(8, 4), tokens(3, 8), **arguments)


def test_shapes() -> None:
    projector = mlp(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 12))
    assert sensitivity(projector, tokens(5, 8)).shape == (5,)
    assert sensitivity(projector, tokens(2, 3, 5, 8)).shape == (2, 3, 5)
    assert sensitivity(projector, tokens(0, 5, 8)).shape == (0, 5)
