"""The kernel of min-max normalised scores: equal to torch."""

from __future__ import annotations

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from llava.pruning.importance.normalise import FLAT, min_max

pytestmark = pytest.mark.triton


def kernel(scores: Tensor, valid: Tensor | None) -> Tensor:
    from llava.pruning.kernels import normalise

    return normalise.min_max(*map(cases.on_device, (scores, valid)), FLAT).cpu()


def reference(scores: Tensor, valid: Tensor | None) -> Tensor:
    with cases.without_kernels():
        return min_max(scores, valid)


def rows(size: int) -> tuple[Tensor, Tensor]:
    """Random, negative, huge and constant scores [4, size], and which are valid."""
    case = cases.make_case(size)
    factors = torch.tensor([1.0, -3.0, 1e30, 0.0])[:, None]
    assert case.valid is not None
    return case.score * factors + torch.tensor([0.0, 0.0, 0.0, 0.7])[:, None], case.valid


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", cases.SIZES)
def test_equals_torch(size: int, masked: bool) -> None:
    scores, valid = rows(size)
    mask = valid if masked else None
    if masked:  # which nobody may look at
        scores = torch.where(valid, scores, torch.nan)
    got = kernel(scores, mask)
    assert torch.equal(got, reference(scores, mask))
    assert (got[3] == (valid[3] if masked else 1)).all()


def test_a_skipped_mask_is_noticed() -> None:
    scores, valid = rows(64)
    assert not torch.equal(kernel(scores, None), reference(scores, valid))


def test_nan_stays_in_its_row() -> None:
    scores, _ = rows(17)
    want = kernel(scores, None)
    scores[1, 3] = torch.nan
    got = kernel(scores, None)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
