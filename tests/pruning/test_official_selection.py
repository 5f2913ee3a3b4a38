"""Methods that select by what the tower sees equal recorded runs of their released code."""

from __future__ import annotations

import pytest
import torch
from official import Official, cases, given_tiles, kept_mask

from llava.pruning import PruningConfig

FP64, FP32 = torch.float64, torch.float32
PRECISIONS = pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])


WRAP = {"wrap_neighbours": True}


def assert_as_recorded(got: torch.Tensor, want: torch.Tensor, exact: bool) -> None:
    """Masks [T, N]: equal, or 98 % of every tile's tokens in common where near-ties decide."""
    want = want.bool()
    assert torch.equal(got.sum(dim=1), want.sum(dim=1))
    common = (got & want).sum(dim=1) / want.sum(dim=1)
    assert (common == 1).all() if exact else (common >= 0.98).all()


@pytest.mark.parametrize("name", cases("hiprune", "stub*"))
@PRECISIONS
def test_hiprune(name: str, dtype: torch.dtype) -> None:
    case = Official(name, dtype)
    # Recorded with two heads and three query rows: the code takes means over both.
    received, middle = (
        case.inputs[f"{layer}_attention"].mean(dim=(1, 2))[:, 1:] for layer in ("deep", "object")
    )
    visual = given_tiles(
        torch.zeros(*received.shape, 1, dtype=dtype),
        received_attention=received,
        object_attention=middle,
    )
    for run in case.about["runs"]:
        config = PruningConfig.of(
            "hiprune", keep_tokens=run["per_tile"], alpha=run["alpha"], **WRAP
        )
        want = case.outputs[f"k{run['retention']}_alpha{run['alpha']}__mask"]
        assert_as_recorded(kept_mask(visual, config), want, run["equal_to_float64"])


@pytest.mark.parametrize("name", cases("fastervlm", "stub*"))
@PRECISIONS
def test_fastervlm(name: str, dtype: torch.dtype) -> None:
    case = Official(name, dtype)
    rows = case.inputs["cls_attention_rows"]
    visual = given_tiles(rows.transpose(1, 2), cls_attention=rows.sum(dim=1))
    for run in case.about["runs"]:
        got = kept_mask(visual, PruningConfig("fastervlm", keep_tokens=run["k"]))
        assert_as_recorded(got, case.outputs[f"k{run['k']}__mask"], run["equal_to_float64"])


@pytest.mark.parametrize("name", cases("vispruner", "stub*"))
def test_vispruner(name: str) -> None:
    """In float64 alone: one swapped near-tie of a round changes every round after it."""
    case = Official(name, FP64)
    attention = case.inputs["cls_attention_rows"].mean(dim=1)
    visual = given_tiles(case.inputs["features"], cls_attention=attention)
    compared = 0
    for run in case.about["runs"]:
        if "official_error" in run:
            continue
        ratio = run["important_ratio"]
        config = PruningConfig.of("vispruner", keep_tokens=run["k"], important_ratio=ratio)
        want = case.outputs[f"k{run['k']}_r{ratio}__mask_f64"]
        assert_as_recorded(kept_mask(visual, config), want, exact=True)
        compared += 1
    assert compared


@pytest.mark.parametrize("name", cases("scope", "stub*"))
@pytest.mark.parametrize(
    ("dtype", "suffix"), [(FP64, "_f64"), (FP32, ""), (torch.float16, "_fp16")], ids=str
)
def test_scope(name: str, dtype: torch.dtype, suffix: str) -> None:
    """In the order of picks; in half precision, where near-ties decide, 98 % of the tokens."""
    case = Official(name, dtype)
    attention = case.inputs["cls_attention_rows"].sum(dim=1)
    visual = given_tiles(case.inputs["hidden_states"][:, 1:], cls_attention=attention)
    for run in case.about["runs"]:
        key = f"k{run['total']}_alpha{run['alpha']}_{run['combined']}__order{suffix}"
        if key not in case.outputs:
            continue
        combine = {"multi": "multiply", "add": "sum"}[run["combined"]]
        config = PruningConfig.of(
            "scope",
            keep_tokens=run["per_tile"],
            alpha=run["alpha"],
            combine=combine,
            precision="model",
        )
        counts = torch.full((len(attention),), run["per_tile"])
        got = config.pruner.select(config.pruner.rows(visual, attention, counts)).indices
        want = case.outputs[key]
        if dtype == FP64 or (dtype == FP32 and run["order_equal_to_float64"]):
            assert torch.equal(got, want), key
        for picks, others in zip(got.tolist(), want.tolist(), strict=True):
            assert len(set(picks) & set(others)) >= 0.98 * len(others), key
