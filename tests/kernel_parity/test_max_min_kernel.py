"""The max-min kernel: equal to the torch loop and to brute force, and never out of range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import kernel_cases as cases
import pytest
import torch
from kernel_cases import Case, on_device

from llava.pruning.selection.max_min import max_min_with_margins
from llava.pruning.selection.rows import Picks

pytestmark = pytest.mark.triton

Select = Callable[[Case], Picks]
KINDS = [(weighted, masked) for weighted in (True, False) for masked in (True, False)]


def kernel(case: Case, gram: torch.Tensor | None = None, scale: torch.Tensor | None = None):
    """Picks of the kernel, on the CPU; of the cosines unless products are given."""
    from llava.pruning.kernels.max_min import max_min_picks

    gram = case.cosines() if gram is None else gram
    tensors = (gram, scale, case.weights, case.score, case.valid, case.counts)
    picks = max_min_picks(*map(on_device, tensors), case.width, case.combine)
    return cases.to_cpu(picks)


def reference(case: Case, row: int) -> Picks:
    """Picks of the torch loop, row `row` alone, first the highest weight."""
    one = case.row(row)
    with cases.without_kernels():
        return max_min_with_margins(
            *(one.z, torch.tensor([case.room(row)])),
            **{"weights": one.weights, "valid": one.valid, "combine": case.combine},
        )


def check_reference(select: Select, case: Case) -> None:
    """Bit for bit the torch loop, every row as if it were alone, padded with -1 and inf."""
    score = torch.ones_like(case.score) if case.weights is None else case.weights
    case = replace(case, score=score)
    got = select(case)
    assert got.indices.shape == got.margins.shape == (len(case.z), case.width)
    for row in range(len(case.z)):
        room = case.room(row)
        want = reference(case, row)
        assert torch.equal(got.indices[row, :room], want.indices[0])
        assert torch.equal(got.margins[row, :room], want.margins[0])
        assert (got.indices[row, room:] == -1).all()
        assert (got.margins[row, room:] == torch.inf).all()


def check_brute_force(select: Select, case: Case) -> None:
    got, compared = select(case), 0
    for row in range(len(case.z)):
        want, margins = cases.brute_force_max_min(case, row)
        compared += cases.same_while_clear(got.indices[row].tolist(), want, margins)
    assert compared >= 10


def check_ties(select: Select) -> None:
    check_reference(select, cases.duplicates_and_ties())


@pytest.mark.parametrize(("weighted", "masked"), KINDS)
@pytest.mark.parametrize("combine", ["multiply", "sum"])
@pytest.mark.parametrize("size", cases.SIZES)
def test_equals_the_torch_loop(size: int, combine: str, weighted: bool, masked: bool) -> None:
    if size == 130 and not (weighted and masked):
        pytest.skip("one case of this size is enough: the interpreter is slow")
    case = cases.make_case(size, weighted=weighted, masked=masked, combine=combine)
    if size == 130:
        case = replace(case, counts=case.counts.clamp(max=20))
    check_reference(kernel, case)


@pytest.mark.parametrize(("weighted", "masked"), KINDS)
@pytest.mark.parametrize("combine", ["multiply", "sum"])
def test_equals_brute_force(combine: str, weighted: bool, masked: bool) -> None:
    case = cases.make_case(17, weighted=weighted, masked=masked, combine=combine)
    check_brute_force(kernel, case)


def test_duplicates_and_ties_go_to_the_lowest_index() -> None:
    check_ties(kernel)


def test_products_with_a_scale_are_cosines() -> None:
    case = cases.make_case(17)
    z = 3 * case.z
    gram, scale = z @ z.mT, 1 / z.norm(dim=-1)
    cosines = gram * (scale[:, :, None] * scale[:, None])
    got, want = kernel(case, gram, scale), kernel(case, cosines)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.margins, want.margins)


def test_a_row_alone_and_in_a_batch() -> None:
    case = cases.make_case(64)
    case = replace(case, counts=torch.tensor([12, 1, 0, 9]))
    together = kernel(case)
    for row, count in enumerate(case.counts.tolist()):
        alone = kernel(case.row(row))
        assert torch.equal(alone.indices[0], together.indices[row, :count])
        assert torch.equal(alone.margins[0], together.margins[row, :count])


def test_no_picks_and_no_rows() -> None:
    case = cases.make_case(17)
    assert kernel(replace(case, counts=torch.zeros(4, dtype=torch.long))).indices.shape == (4, 0)
    nothing = torch.zeros(4, 17, dtype=torch.bool)
    got = kernel(replace(case, valid=nothing, counts=torch.tensor([3, 1, 2, 0])))
    assert torch.equal(got.indices, torch.full((4, 3), -1))
    assert (got.margins == torch.inf).all()


@pytest.mark.parametrize("where", ["some products", "all products", "scores", "all"])
def test_nan_stays_in_range_and_in_its_row(where: str) -> None:
    case = replace(cases.make_case(17), counts=torch.tensor([17, 9, 17, 5]))
    gram, score = case.cosines(), case.score.clone()
    want = kernel(case, gram)
    if where == "some products":
        gram[0, 3] = gram[0, :, 3] = torch.nan
        gram[2, 5, 6] = torch.inf
    if where in ("all products", "all"):
        gram[::2] = torch.nan
    if where in ("scores", "all"):
        score[::2] = torch.nan
    got = kernel(replace(case, score=score), gram)
    for row in range(4):
        if row % 2:
            assert torch.equal(got.indices[row], want.indices[row])
        room = case.room(row)
        picks = got.indices[row, :room].tolist()
        assert len(set(picks)) == room
        assert case.valid is not None and case.valid[row, picks].all()
        assert (got.indices[row, room:] == -1).all()


# --- the checks above notice a kernel that is wrong -----------------------------------------------


def ties_to_the_highest(case: Case) -> Picks:
    """The kernel on tokens in reverse order."""
    turned = {
        name: None if value is None else value.flip(1)
        for name in ("z", "weights", "score", "valid")
        for value in [getattr(case, name)]
    }
    got = kernel(replace(case, **turned))
    back = case.z.shape[1] - 1 - got.indices
    return Picks(torch.where(got.indices < 0, -1, back), got.margins)


def mask_skipped(case: Case) -> Picks:
    return kernel(replace(case, valid=None))


def weights_skipped(case: Case) -> Picks:
    return kernel(replace(case, weights=None))


def counts_skipped(case: Case) -> Picks:
    return kernel(replace(case, counts=torch.full_like(case.counts, case.width)))


def other_sum(case: Case) -> Picks:
    return kernel(replace(case, combine="sum"))


def best_for_margin(case: Case) -> Picks:
    return Picks(kernel(case).indices, 2 * kernel(case).margins)


@pytest.mark.parametrize(
    "broken", [mask_skipped, weights_skipped, counts_skipped, other_sum, best_for_margin]
)
def test_a_wrong_kernel_is_noticed(broken: Select) -> None:
    with pytest.raises(AssertionError):
        check_reference(broken, cases.make_case(17))


@pytest.mark.parametrize("broken", [mask_skipped, weights_skipped, other_sum])
def test_brute_force_notices_a_wrong_kernel(broken: Select) -> None:
    with pytest.raises(AssertionError):
        check_brute_force(broken, cases.make_case(17))


def test_ties_to_the_highest_index_are_noticed() -> None:
    with pytest.raises(AssertionError):
        check_ties(ties_to_the_highest)
