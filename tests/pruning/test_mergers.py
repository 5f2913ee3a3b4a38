"""Sensitivity of mergers that normalise, built by transformers' own classes."""

from __future__ import annotations

import copy

import pytest
import torch
from projector_inputs import (
    BF16,
    ESTIMATORS,
    FP64,
    NORMED,
    PLAIN,
    as_black_box,
    draw,
    frobenius,
    internvl,
    qwen3,
    tokens,
    width_of,
)

from llava.pruning import PruningError, sensitivity
from llava.pruning.importance import normed
from llava.pruning.importance import sensitivity as module
from llava.pruning.importance.projectors import (
    JoinedMerger,
    normed_merger,
)
from llava.pruning.late_checks import collecting


@pytest.mark.parametrize("name", NORMED)
def test_closed_form_equals_brute_force_jacobians(name) -> None:
    build, double = NORMED[name]
    projector = build()
    assert normed_merger(projector) is not None
    x = tokens(projector)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(
        got, frobenius(projector, x), rtol=1e-9 if double else 1e-5, atol=1e-12
    )


@pytest.mark.parametrize("name", NORMED)
def test_shortcut_equals_black_box(name, monkeypatch) -> None:
    build, double = NORMED[name]
    projector = build()
    x = tokens(projector)
    short = sensitivity(projector, x)
    as_black_box(monkeypatch)
    want = sensitivity(projector, x)
    torch.testing.assert_close(short, want, rtol=1e-9 if double else 1e-2, atol=0)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu"])
def test_activations_of_transformers(act) -> None:
    projector = internvl(act)
    assert normed_merger(projector) is not None
    x = tokens(projector)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-9, atol=0)


def test_a_token_without_variance() -> None:
    """v = 0 and sigma = sqrt(eps): the largest derivative there is, and no division by zero."""
    projector = JoinedMerger(qwen3(), 4)
    x = torch.full((2, 48), 0.7, dtype=FP64)
    x[1] = tokens(projector)[3]
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-9, atol=0)
    assert torch.isfinite(sensitivity(projector, x)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NORMED)
def test_float32_is_close_to_float64(name, estimator) -> None:
    build, _ = NORMED[name]
    projector = build()
    x = tokens(projector, dtype=torch.float32)
    want = sensitivity(projector, x.double(), estimator=estimator)
    got = sensitivity(projector.float(), x, estimator=estimator)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_precision_of_products(estimator, dtype) -> None:
    """float32 in 16-bit models, unless `compute` says otherwise; that is below the spread."""
    projector = JoinedMerger(qwen3(), 4).to(dtype)
    x = tokens(projector, 40, dtype)
    want = sensitivity(copy.deepcopy(projector).double(), x.double(), estimator=estimator)
    errors = [
        float(((got.double() - want) / want).abs().max())
        for compute in ("float32", "split", "bf16")
        for got in [sensitivity(projector, x, estimator=estimator, compute=compute)]
    ]
    assert errors[0] < 1e-4 and errors[1] < 4e-3 and 1e-5 < errors[2] < 4e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["qwen3-vl", "internvl"])
def test_a_row_scores_the_same_alone_in_a_batch_and_in_pieces(name, estimator, monkeypatch) -> None:
    projector = NORMED[name][0]().float()
    x = torch.stack([tokens(projector, 31, torch.float32), draw(31, 48, dtype=torch.float32)])
    batch = sensitivity(projector, x, estimator=estimator)
    for row in range(2):
        assert torch.equal(batch[row], sensitivity(projector, x[row].clone(), estimator=estimator))
    projector, x = projector.double(), x.double()
    whole = sensitivity(projector, x, estimator=estimator)
    for size in (1, 100_000):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        pieces = sensitivity(projector, x, estimator=estimator)
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_waits_for_an_accelerator(estimator) -> None:
    """A meta tensor has no data, so whatever reads some raises."""
    for build in (internvl, lambda: JoinedMerger(qwen3(), 4), PLAIN["llava"]):
        projector = build().to("meta", BF16)
        x = torch.empty(2, 30, width_of(projector), device="meta", dtype=BF16)
        for compute in ("float32", "split", "bf16"):
            with collecting() as late:
                for _ in range(2):
                    scores = sensitivity(projector, x, estimator=estimator, compute=compute)
            assert scores.shape == (2, 30)
            assert late  # the second call checks the weights, later
            late.clear()


def test_forms_are_made_once_and_follow_the_weights(monkeypatch) -> None:
    merger = qwen3()
    x, calls = tokens(JoinedMerger(merger, 4)), []
    make = normed._quadratic_forms

    def counted(*arguments):
        calls.append(1)
        return make(*arguments)

    monkeypatch.setattr(normed, "_quadratic_forms", counted)
    for _ in range(3):
        sensitivity(JoinedMerger(merger, 4), x, estimator="exact")
    assert len(calls) == 1
    for layer in (merger.norm, merger.linear_fc1, merger.linear_fc2):
        layer.weight.data.mul_(1.5)
        got = sensitivity(JoinedMerger(merger, 4), x, estimator="exact")
        want = frobenius(JoinedMerger(merger, 4), x)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    assert len(calls) == 4


def test_joined_merger_shares_the_merger() -> None:
    merger = qwen3()
    joined, x = JoinedMerger(merger, 4), draw(2, 5, 48)
    assert {p.data_ptr() for p in joined.parameters()} == {
        p.data_ptr() for p in merger.parameters()
    }
    assert torch.equal(joined(x), merger(x.view(-1, 12)).view(2, 5, 20))
    with pytest.raises(PruningError, match="groups must be at least 1"):
        JoinedMerger(merger, 0)
