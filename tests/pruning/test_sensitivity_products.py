"""What sensitivities are made of: triangular products, derivatives, precision, cached weights."""

from __future__ import annotations

import copy
import threading

import pruning_checks as checks
import pytest
import torch
from torch import nn

from llava.pruning import PruningConfig, PruningError, forget, get_method, sensitivity
from llava.pruning.importance import sensitivity as module
from llava.pruning.importance.derivatives import ELEMENTWISE, derivative
from llava.pruning.importance.triangular import (
    fold,
    quadratic_form,
    split_parts,
    squared_norms,
    triangular_factor,
)
from llava.pruning.importance.two_layer import _differences, blocks, plan
from llava.pruning.importance.weight_cache import WeightCache
from llava.pruning.late_checks import collecting
from llava.pruning.precision import multiplies_bf16_fast, product_precision

FP64, BF16 = torch.float64, torch.bfloat16
ESTIMATORS = ("zeroth_order", "exact")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=FP64).to(dtype)


def mlp(dv: int = 24, width: int = 600, d: int = 40, **kwargs) -> nn.Sequential:
    """Wider than a block of rows, with a bias that is not small."""
    projector = nn.Sequential(nn.Linear(dv, width), nn.GELU(), nn.Linear(width, d))
    with torch.no_grad():
        for seed, p in enumerate(projector.parameters()):
            p.copy_(draw(*p.shape, seed=seed) * 0.2)
    return projector.to(**kwargs)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.double() - want) / want).abs().max())


@pytest.mark.parametrize("act", ELEMENTWISE, ids=lambda act: act.__name__)
def test_derivative_equals_forward_mode(act) -> None:
    settings = {
        nn.GELU: [{}, {"approximate": "tanh"}],
        nn.ELU: [{}, {"alpha": 0.3}],
        nn.LeakyReLU: [{}, {"negative_slope": 0.3}],
        nn.Softplus: [{}, {"beta": 2.0, "threshold": 3.0}],
        nn.ReLU: [{}, {"inplace": True}],
    }
    h = torch.cat([draw(400) * 3, torch.tensor([0.0, 3.0, -3.0], dtype=FP64)])
    for arguments in settings.get(act, [{}]):
        layer = act(**arguments)
        twin = act(**{key: value for key, value in arguments.items() if key != "inplace"})
        want = torch.func.jvp(twin, (h.clone(),), (torch.ones_like(h),))[1]
        before = h.clone()
        torch.testing.assert_close(derivative(layer, h), want, rtol=1e-12, atol=1e-14)
        assert torch.equal(h, before)


@pytest.mark.parametrize("shape", [(600, 24, 40), (600, 24, 700), (300, 8, 300), (20, 8, 12)])
def test_triangular_products_are_exact(shape) -> None:
    width, dv, d = shape
    w1, w2, g = draw(width, dv), draw(d, width, seed=1), draw(7, width, seed=2)
    q = (w2.T @ w2) * (w1 @ w1.T)
    folded = fold(w1, w2)
    assert torch.equal(folded, folded.triu())
    want = torch.einsum("nh,hk,nk->n", g, q, g)
    torch.testing.assert_close(quadratic_form(g, folded), want, rtol=1e-10, atol=1e-8)
    factor = triangular_factor(w2)
    assert factor.shape == (min(d, width), width)
    assert torch.equal(factor, factor.triu())
    norms = squared_norms((g[:6],), factor, FP64)
    torch.testing.assert_close(norms, (g[:6] @ w2.T).square().sum(dim=1), rtol=1e-10, atol=0)
    added = draw(3, len(factor), seed=3)
    both = squared_norms((g[:6],), factor, FP64, added)
    want = (g[:6].view(2, 3, width) @ factor.T + added).square().sum(dim=2).flatten()
    torch.testing.assert_close(both, want, rtol=1e-10, atol=0)


def test_parts_add_up() -> None:
    x = draw(50, 30, dtype=torch.float32)
    assert split_parts(x, "float32")[0] is x
    (low,) = split_parts(x, "bf16")
    assert torch.equal(low, x.bfloat16())
    high, rest = split_parts(x, "split")
    assert high.dtype == rest.dtype == BF16
    assert float(((high.float() + rest.float() - x) / x).abs().max()) < 2**-15


def test_blocks_cover_everything_once() -> None:
    for count, lanes, rows in ((7, 5, 1), (7, 5, 3), (7, 5, 12), (7, 5, 0), (7, 5, 1000)):
        seen = torch.zeros(count, lanes)
        for tokens, some in blocks(count, lanes, rows):
            assert seen[tokens, some].numel() <= max(rows, 1)
            seen[tokens, some] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_precision_of_products(estimator, dtype) -> None:
    """bf16 is worse than float32 and split between the two, but all are far below the spread."""
    projector, x = mlp(dtype=dtype), draw(60, 24, seed=9, dtype=dtype)
    want = sensitivity(copy.deepcopy(projector).double(), x.double(), estimator=estimator)
    errors = [
        relative_error(sensitivity(projector, x, estimator=estimator, compute=compute), want)
        for compute in ("float32", "split", "bf16")
    ]
    assert errors[0] < 1e-5 < errors[2] < 1e-3
    assert errors[1] < 1e-3
    auto = sensitivity(projector, x, estimator=estimator)
    assert auto.dtype == torch.float32
    chosen = "bf16" if multiplies_bf16_fast(x.device) else "float32"
    assert torch.equal(auto, sensitivity(projector, x, estimator=estimator, compute=chosen))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_what_differs_from_the_origin_is_rounded(estimator) -> None:
    """A token of zeros has the score of float32, whatever the products are rounded to."""
    projector, x = mlp(dtype=BF16), torch.zeros(3, 24, dtype=BF16)
    want = sensitivity(copy.deepcopy(projector).double(), x.double(), estimator=estimator)
    got = sensitivity(projector, x, estimator=estimator, compute="bf16")
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_explicit_precision_is_obeyed_by_every_model(estimator) -> None:
    projector, x = mlp(), draw(20, 24, seed=9, dtype=torch.float32)
    plain = sensitivity(projector, x, estimator=estimator)
    assert torch.equal(plain, sensitivity(projector, x, estimator=estimator, compute="float32"))
    for compute in ("split", "bf16"):
        rounded = sensitivity(projector, x, estimator=estimator, compute=compute)
        assert not torch.equal(rounded, plain)
        torch.testing.assert_close(rounded, plain, rtol=1e-3, atol=0)


def test_auto_goes_by_model_and_device(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for fast in (False, True):
        monkeypatch.setattr(
            "llava.pruning.precision.multiplies_bf16_fast", lambda device, fast=fast: fast
        )
        narrow = "bf16" if fast else "float32"
        assert product_precision("auto", BF16, cpu) == narrow
        assert product_precision("auto", torch.float16, cpu) == narrow
        assert product_precision("auto", torch.float32, cpu) == "float32"
        assert product_precision("auto", FP64, cpu) == "float32"
        assert product_precision("split", FP64, cpu) == "split"
    with pytest.raises(PruningError, match="unknown compute 'fp8'"):
        sensitivity(mlp(), draw(3, 24, dtype=torch.float32), compute="fp8")


def test_compute_is_a_setting() -> None:
    config = PruningConfig("zoo", keep_tokens=4, compute="bf16")
    assert config.to_dict()["compute"] == "bf16"
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert "compute" not in PruningConfig("zoo", keep_tokens=4).to_dict()
    assert PruningConfig("prumerge", keep_tokens=4, compute="split").compute == "split"
    with pytest.raises(PruningError, match="unknown compute 'tf32'"):
        PruningConfig("zoo", keep_tokens=4, compute="tf32")


@pytest.mark.parametrize("name", ["zoo", "zoo-exact", "least-sensitive"])
def test_methods_pass_setting_and_pre_activations_on(name) -> None:
    visual, method = checks.visual_for(name), PruningConfig(name, keep_tokens=4).pruner
    plain = method.score(visual)
    visual.compute = "bf16"
    assert not torch.equal(method.score(visual), plain)
    visual.compute = "auto"
    hidden = visual.extras["projector_hidden"]
    visual.extras["projector_hidden"] = [tile + 1 for tile in hidden]
    assert not torch.equal(method.score(visual), plain)
    del visual.extras["projector_hidden"]
    torch.testing.assert_close(method.score(visual), plain)
    if "projector_rank" in get_method(name).__dataclass_fields__:
        low = PruningConfig(name, keep_tokens=4, options={"projector_rank": 2}).pruner
        want = low.score(visual)
        visual.extras["projector_hidden"] = hidden
        assert torch.equal(low.score(visual), want)  # its first layer is another one


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pre_activations_are_reused(estimator) -> None:
    projector, x = mlp().double(), draw(2, 15, 24, seed=5)
    want = sensitivity(projector, x, estimator=estimator)
    hidden = projector[0](x)
    for given in (hidden, [*hidden]):
        torch.testing.assert_close(
            sensitivity(projector, x, estimator=estimator, hidden=given), want, rtol=1e-12, atol=0
        )
    with pytest.raises(PruningError, match=r"2 tiles, \[15, 600\] each"):
        sensitivity(projector, x, estimator=estimator, hidden=hidden[:, :-1])


@pytest.mark.parametrize("precision", ["float32", "split", "bf16"])
def test_differences_do_not_depend_on_pieces(precision) -> None:
    at, nudges = draw(5, 33).float(), draw(7, 33, seed=1).float() * 0.01
    centres = None if precision == "float32" else draw(7, 33, seed=2).float() * 0.001
    whole = _differences(nn.GELU(), at, nudges, precision, centres, 1000)
    want = nn.functional.gelu(at[:, None] + nudges) - nn.functional.gelu(at[:, None] - nudges)
    want = (want if centres is None else want - centres).flatten(0, 1)
    assert [part.dtype for part in whole] == [part.dtype for part in split_parts(want, precision)]
    error = (sum(part.float() for part in whole) - want).abs().max() / want.abs().max()
    assert error < {"float32": 1e-6, "split": 2**-16, "bf16": 2**-8}[precision]
    for rows in (1, 15):
        pieces = _differences(nn.GELU(), at, nudges, precision, centres, rows)
        for got, part in zip(pieces, whole, strict=True):
            torch.testing.assert_close(got, part, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "split", "bf16"])
def test_chunks_of_an_accelerator_score_as_those_of_a_cpu(compute, monkeypatch) -> None:
    """Pieces of chunks, and chunks, that end within the tokens and within the directions."""
    projector, x = mlp(d=600), draw(2, 15, 24, seed=5).float()
    want = sensitivity(projector, x, directions=7, compute=compute)
    plans: list[tuple[int, int]] = []
    sizes = [2**16, 2**18, 2**28]

    def of_an_accelerator(device, factor, precision, chunk_bytes) -> tuple[int, int]:
        plans.append(plan(torch.device("meta"), factor, precision, sizes.pop()))
        return plans[-1]

    monkeypatch.setattr("llava.pruning.importance.two_layer.plan", of_an_accelerator)
    while sizes:
        got = sensitivity(projector, x, directions=7, compute=compute)
        torch.testing.assert_close(got, want, rtol=2e-6 if compute == "float32" else 1e-4, atol=0)
    every = 15 * 7
    assert plans[0][1] > every and plans[1][0] > 7 > plans[1][0] % 7 > 0 and plans[2][1] < 7


# --- cached weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_write_through_data_changes_the_scores(estimator, dtype) -> None:
    projector, x = mlp(dtype=dtype), draw(9, 24, seed=3, dtype=dtype)
    before = sensitivity(projector, x, estimator=estimator)
    projector[2].weight.data.add_(0.5)
    after = sensitivity(projector, x, estimator=estimator)
    assert not torch.equal(before, after)
    assert torch.equal(after, sensitivity(copy.deepcopy(projector), x, estimator=estimator))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1,), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.uint8], ids=str)
def test_one_changed_number_is_noticed(shape, dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
    cache, calls = WeightCache(), []
    for _ in range(2):
        cache.get(module, "sum", lambda: calls.append(1))
    assert len(calls) == 1
    if module.weight.numel():
        module.weight.data.flatten()[-1] = 2
        cache.get(module, "sum", lambda: calls.append(1))
        assert len(calls) == 2


def test_a_transposed_weight_is_looked_at() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(draw(6, 4).T)
    cache, calls = WeightCache(), []
    for change in (0, 0, 1):
        module.weight.data[0, 0] += change
        cache.get(module, "sum", lambda: calls.append(1))
    assert len(calls) == 2


def test_nothing_waits_for_an_accelerator() -> None:
    """A meta tensor has no data, so whatever reads some raises."""
    projector = mlp(device="meta", dtype=BF16)
    x = torch.empty(2, 576, 24, device="meta", dtype=BF16)
    hidden = [*torch.empty(2, 576, 600, device="meta", dtype=BF16)]
    for estimator in ESTIMATORS:
        for compute in ("float32", "split", "bf16"):
            for given in (None, hidden):
                with collecting() as late:
                    for _ in range(2):
                        scores = sensitivity(
                            projector, x, estimator=estimator, compute=compute, hidden=given
                        )
                assert scores.shape == (2, 576)
                assert late  # the second call checks the weights, later
                late.clear()


def test_a_late_check_finds_the_write_and_forgets() -> None:
    """As on an accelerator, with the weights on the CPU so that there is something to compare."""
    cache, calls, projector = WeightCache(), [], mlp()

    class _Away(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    weights = [_Away(parameter.detach()) for parameter in projector.parameters()]

    class Elsewhere(nn.Module):
        def parameters(self, recurse: bool = True):
            yield from weights

    away = Elsewhere()
    cache.get(away, "sum", lambda: calls.append(1))
    with collecting() as late:
        cache.get(away, "sum", lambda: calls.append(1))
    late.settle()
    projector[0].weight.data.add_(1)
    with collecting() as late:
        cache.get(away, "sum", lambda: calls.append(1))
    assert len(calls) == 1
    with pytest.raises(PruningError, match=r"forget\(projector\)"):
        late.settle()
    cache.get(away, "sum", lambda: calls.append(1))
    assert len(calls) == 2


def test_forget_drops_everything_of_one_projector() -> None:
    one, other = mlp(), mlp()
    caches, calls = (WeightCache(), WeightCache()), []
    for cache in caches:
        for projector in (one, other):
            cache.get(projector, "value", lambda: calls.append(1))
    forget(one)
    for cache in caches:
        for projector in (one, other):
            cache.get(projector, "value", lambda: calls.append(1))
    assert len(calls) == 4 + 2
    forget(nn.Linear(2, 2))  # never seen: nothing to do


def test_threads_share_the_cache() -> None:
    projector, x = mlp(), draw(9, 24, seed=3, dtype=torch.float32)
    want, found = sensitivity(projector, x, estimator="exact"), []

    def work() -> None:
        for _ in range(20):
            forget(projector)
            found.append(sensitivity(projector, x, estimator="exact"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(scores, want) for scores in found)


def test_directions_are_copied_to_an_accelerator_once() -> None:
    device = torch.device("meta")
    first = module._bank_on(device, torch.float32, 3, 8, 5)
    assert module._bank_on(device, torch.float32, 3, 8, 5) is first
    assert first.device == device


def test_another_weight_in_the_same_place_is_not_the_cached_one() -> None:
    """Address and version of a new parameter may be those of one that is gone."""
    cache, calls, projector = WeightCache(), [], mlp()
    cache.get(projector, "sum", lambda: calls.append(1))
    layer = projector[0]
    same = nn.Parameter(layer.weight.data, requires_grad=False)
    assert same.data_ptr() == layer.weight.data_ptr()
    layer.weight = same
    cache.get(projector, "sum", lambda: calls.append(1))
    assert len(calls) == 2
