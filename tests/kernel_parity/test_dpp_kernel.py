"""The kernel of determinants: equal to the torch loop and to determinants, guarded, in range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import kernel_cases as cases
import pytest
import torch
from kernel_cases import Case, on_device
from torch import Tensor

from llava.pruning.selection.dpp import SPENT, dpp
from llava.pruning.selection.rows import Picks

pytestmark = pytest.mark.triton

Select = Callable[[Case], Picks]


def kernel(case: Case, similarity: Tensor | None = None) -> Picks:
    """Picks of the kernel, on the CPU."""
    from llava.pruning.kernels.dpp import determinant_picks

    if similarity is None:
        similarity = case.cosines()
        similarity.diagonal(dim1=1, dim2=2).fill_(1)
    tensors = (similarity, case.weights, case.valid, case.counts)
    spent = SPENT * torch.finfo(torch.float32).eps
    return cases.to_cpu(determinant_picks(*map(on_device, tensors), case.width, spent))


def make_case(size: int, *, weighted: bool = True, masked: bool = True) -> Case:
    """A case whose weights, the quality, are above zero; 12 is the rank of its rows."""
    case = cases.make_case(size, masked=masked)
    quality = None if not weighted or case.weights is None else 0.5 + case.score
    return replace(case, weights=quality)


def reference(case: Case, row: int) -> Picks:
    """Picks of the torch loop, row `row` alone."""
    one = case.row(row)
    with cases.without_kernels():
        return dpp(one.z, case.room(row), quality=one.weights, valid=one.valid)


def check_reference(select: Select, case: Case) -> None:
    """The torch loop's picks, every row as if it were alone; margins up to rounding."""
    got = select(case)
    assert got.indices.shape == got.margins.shape == (len(case.z), case.width)
    for row in range(len(case.z)):
        room, want = case.room(row), reference(case, row)
        assert torch.equal(got.indices[row, :room], want.indices[0])
        # Sums of other orders, and of tokens that are all but spent.
        torch.testing.assert_close(
            got.margins[row, :room], want.margins[0], rtol=1e-4, atol=1e-4, equal_nan=True
        )
        assert (got.indices[row, room:] == -1).all()
        assert (got.margins[row, room:] == torch.inf).all()


def check_determinants(select: Select, case: Case) -> None:
    got, compared = select(case), 0
    for row in range(len(case.z)):
        z = torch.nn.functional.normalize(case.z[row].double(), dim=-1)
        quality = torch.ones(len(z)) if case.weights is None else case.weights[row]
        matrix = quality.double()[:, None] * (z @ z.T).fill_diagonal_(1) * quality.double()
        free = [n for n in range(len(z)) if case.valid is None or case.valid[row, n]]
        count = min(case.room(row), 8)  # below the rank
        want, margins = cases.brute_force_dpp(matrix, free, count)
        compared += cases.same_while_clear(got.indices[row].tolist(), want, margins)
    assert compared >= 10


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", cases.SIZES)
def test_equals_the_torch_loop(size: int, masked: bool, weighted: bool) -> None:
    """Within the rank of the kernel, and for 17 tokens beyond it."""
    case = make_case(size, masked=masked, weighted=weighted)
    if size > 17:
        case = replace(case, counts=case.counts.clamp(max=11))
    check_reference(kernel, case)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_determinants(masked: bool, weighted: bool) -> None:
    check_determinants(kernel, make_case(17, masked=masked, weighted=weighted))


def test_duplicates_and_ties() -> None:
    """Five directions: the first five picks are one of each, then quality decides."""
    case = cases.duplicates_and_ties()
    check_reference(kernel, case)
    first = kernel(case).indices[0, :5]
    assert sorted((first % 5).tolist()) == [0, 1, 2, 3, 4]


def test_a_row_alone_and_in_a_batch() -> None:
    case = replace(make_case(64), counts=torch.tensor([9, 1, 0, 11]))
    together = kernel(case)
    for row, count in enumerate(case.counts.tolist()):
        alone = kernel(case.row(row))
        assert torch.equal(alone.indices[0], together.indices[row, :count])
        assert torch.equal(alone.margins[0], together.margins[row, :count])


@pytest.mark.parametrize("where", ["products", "quality", "both"])
def test_nan_stays_in_range_and_in_its_row(where: str) -> None:
    case = replace(make_case(17), counts=torch.tensor([17, 9, 17, 5]))
    similarity = case.cosines()
    similarity.diagonal(dim1=1, dim2=2).fill_(1)
    want = kernel(case, similarity)
    assert case.weights is not None and case.valid is not None
    if where in ("products", "both"):
        similarity[0, 2:5] = torch.nan
        similarity[2] = torch.nan
    if where in ("quality", "both"):
        case.weights[::2, ::3] = torch.nan
    got = kernel(case, similarity)
    for row in range(4):
        if row % 2:
            assert torch.equal(got.indices[row], want.indices[row])
        room = case.room(row)
        picks = got.indices[row, :room].tolist()
        assert len(set(picks)) == room
        assert case.valid[row, picks].all()


def mask_skipped(case: Case) -> Picks:
    return kernel(replace(case, valid=None))


def quality_skipped(case: Case) -> Picks:
    return kernel(replace(case, weights=None))


def guard_skipped(case: Case) -> Picks:
    """The kernel with next to nothing that counts as spent."""
    from llava.pruning.kernels.dpp import determinant_picks

    similarity = case.cosines()
    similarity.diagonal(dim1=1, dim2=2).fill_(1)
    tensors = (similarity, case.weights, case.valid, case.counts)
    return cases.to_cpu(determinant_picks(*map(on_device, tensors), case.width, -1.0))


@pytest.mark.parametrize("broken", [mask_skipped, quality_skipped, guard_skipped])
def test_a_wrong_kernel_is_noticed(broken: Select) -> None:
    case = make_case(17)
    check_reference(kernel, case)
    with pytest.raises(AssertionError):
        check_reference(broken, case)


@pytest.mark.parametrize("broken", [mask_skipped, quality_skipped])
def test_determinants_notice_a_wrong_kernel(broken: Select) -> None:
    with pytest.raises(AssertionError):
        check_determinants(broken, make_case(17))
