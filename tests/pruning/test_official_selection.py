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
