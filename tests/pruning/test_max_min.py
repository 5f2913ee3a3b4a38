"""Selection: brute force, batches, guards, and properties over random inputs."""

from __future__ import annotations

import pruning_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.pruning import PruningError, max_min
from llava.pruning.selection.max_min import max_min_with_margins
from llava.pruning.selection.rows import ranking, top_k

few = settings(max_examples=30, deadline=None)


def draw(rows: int, n: int, d: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, d, generator=generator, dtype=torch.float64).to(dtype)


def test_brute_force() -> None:
    checks.check_brute_force()


def test_ties_go_to_the_lowest_index() -> None:
    checks.check_ties_to_lowest()


def test_mutually_nearest_tokens_tie_for_most_isolated() -> None:
    # Tokens 1 and 3 are each other's nearest neighbour and the most isolated: the pair's distance
    # must not depend on its order, in float32 either.
    for seed in range(20):
        z = draw(1, 40, 33, seed, torch.float32)
        unit = torch.nn.functional.normalize(z[0].double(), dim=-1)
        nearest = (unit @ unit.T - 3 * torch.eye(40)).amax(dim=1)
        ties = (nearest <= nearest.min() + 1e-12).nonzero()[:, 0]
        if len(ties) > 1:
            assert int(max_min(z, 1, first="isolated")) == int(ties[0])


@given(
    n=st.integers(1, 24),
    d=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    data=st.data(),
    first=st.sampled_from(["importance", "isolated"]),
)
@few
def test_equals_brute_force(n, d, seed, data, first) -> None:
    k = data.draw(st.integers(1, n))
    z, weights = draw(1, n, d, seed), draw(1, n, 1, seed + 1).abs()[..., 0]
    got = max_min_with_margins(z, k, weights=weights, first=first)
    want = checks.brute_force(z[0], k, weights[0], None, first)
    margins = got.margins[0].tolist()
    # In one dimension tokens coincide in direction; past a tie any order of equals is right.
    safe = next((i for i, margin in enumerate(margins) if margin < 1e-9), k)
    assert got.indices[0, :safe].tolist() == want[:safe]
    assert len(set(got.indices[0].tolist())) == k


@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), repeats=st.integers(1, 5), data=st.data())
@few
def test_duplicates_and_masks_keep_the_count(n, seed, repeats, data) -> None:
    z = draw(2, n, 6, seed, torch.float32).repeat(1, repeats, 1)
    total = n * repeats
    valid = torch.rand(2, total, generator=torch.Generator().manual_seed(seed)) > 0.4
    counts = torch.tensor(
        [data.draw(st.integers(0, size)) for size in valid.sum(dim=1).tolist()], dtype=torch.long
    )
    picks = max_min(z, counts, valid=valid, first="isolated")
    for row, count in enumerate(counts.tolist()):
        chosen = picks[row, :count].tolist()
        assert len(set(chosen)) == count
        assert valid[row][chosen].all()
        assert (picks[row, count:] == -1).all()


@given(n=st.integers(2, 40), seed=st.integers(0, 10_000), data=st.data())
@few
def test_permutation(n, seed, data) -> None:
    k = data.draw(st.integers(1, n))
    z, weights = draw(1, n, 8, seed), draw(1, n, 1, seed + 1)[..., 0].abs()
    got = max_min_with_margins(z, k, weights=weights)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    moved = max_min(z[:, order], k, weights=weights[:, order])
    if (got.margins > 1e-5).all():
        assert torch.equal(order[moved[0]], got.indices[0])


@given(rows=st.integers(1, 7), n=st.integers(1, 37), d=st.integers(1, 33), seed=st.integers(0, 999))
@few
def test_rows_are_independent_of_their_batch(rows, n, d, seed) -> None:
    """Promise 3 on odd shapes: bit-identical tokens give identical indices and margins."""
    z = draw(rows, n, d, seed, torch.float32)
    weights = draw(rows, n, 1, seed + 1, torch.float32)[..., 0].abs()
    k = max(1, n // 2)
    batch = max_min_with_margins(z, k, weights=weights)
    # The same row again behind padding: neither the mask nor the width may change a bit.
    padded = torch.cat([torch.full((rows, 3, d), torch.nan), z], dim=1)
    valid = torch.arange(n + 3)[None].expand(rows, -1) >= 3
    wide = torch.nn.functional.pad(weights, (3, 0))
    behind = max_min_with_margins(padded, k, weights=wide, valid=valid)
    for row in range(rows):
        alone = max_min_with_margins(z[row : row + 1].clone(), k, weights=weights[row : row + 1])
        for other in (batch, behind._replace(indices=behind.indices - 3)):
            assert torch.equal(alone.indices[0], other.indices[row])
            assert torch.equal(alone.margins[0], other.margins[row])


@pytest.mark.parametrize("rows", [5, 9])
def test_a_larger_odd_batch_is_bit_identical(rows) -> None:
    z = draw(rows, 577, 129, 4, torch.float32)
    batch = max_min_with_margins(z, 64, first="isolated")
    for row in range(rows):
        alone = max_min_with_margins(z[row : row + 1].clone(), 64, first="isolated")
        assert torch.equal(batch.indices[row], alone.indices[0])
        assert torch.equal(batch.margins[row], alone.margins[0])


def test_first_pick() -> None:
    z, weights = draw(2, 12, 5, 0), torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(max_min(z, 3, weights=weights)[:, 0], weights.argmax(dim=1))
    assert max_min(z, 3, first=7)[:, 0].tolist() == [7, 7]
    # Without weights every token matters the same, so the lowest index comes first.
    assert max_min(z, 3)[:, 0].tolist() == [0, 0]
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7] = False
    with pytest.raises(PruningError, match="first=7"):
        max_min(z, 3, first=7, valid=valid)


def test_all_and_none() -> None:
    z = draw(3, 9, 4, 1)
    assert max_min(z, 9).sort(dim=1).values.tolist() == [list(range(9))] * 3
    assert max_min(z, 0).shape == (3, 0)
    assert max_min(z[:0], 2).shape == (0, 0)


def test_zero_vectors_do_not_divide_by_zero() -> None:
    picks = max_min_with_margins(torch.zeros(1, 5, 3), 5)
    assert sorted(picks.indices[0].tolist()) == [0, 1, 2, 3, 4]
    assert not picks.margins.isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_is_refused(value) -> None:
    z, weights = draw(2, 6, 4, 0), torch.ones(2, 6)
    bad = z.clone()
    bad[1, 2, 0] = value
    with pytest.raises(PruningError, match="NaN or inf"):
        max_min(bad, 2)
    weights[0, 1] = value
    with pytest.raises(PruningError, match="NaN or inf"):
        max_min(z, 2, weights=weights)
    with pytest.raises(PruningError, match="NaN"):
        top_k(torch.tensor([[1.0, torch.nan]]), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 7}, "cannot pick 7 of the 6"),
        ({"k": -1}, "cannot pick -1"),
        ({"k": torch.tensor([1, 7])}, "of row 1"),
        ({"k": torch.tensor([1])}, "1 entries for 2 rows"),
        ({"k": 2, "first": "farthest"}, "isolated"),
        ({"k": 2, "combine": "max"}, "multiply"),
        ({"k": 2, "weights": torch.ones(2, 5)}, "weights must be"),
        ({"k": 2, "weights": torch.full((2, 6), -0.1)}, "weights below 0"),
        ({"k": 2, "valid": torch.ones(1, 6, dtype=torch.bool)}, "valid must be"),
        ({"k": 2, "valid": torch.zeros(2, 6, dtype=torch.bool)}, "of the 0 valid"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(PruningError, match=message):
        max_min(draw(2, 6, 4, 0), **arguments)


def test_wrong_rank() -> None:
    with pytest.raises(PruningError, match=r"\[B, N, D\]"):
        max_min(torch.ones(4, 4), 2)


@given(n=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
@few
def test_top_k(n, seed, data) -> None:
    k = data.draw(st.integers(0, n))
    # Few distinct values, so ties are common.
    scores = torch.randint(0, 4, (1, n), generator=torch.Generator().manual_seed(seed)).float()
    got = top_k(scores, k)
    want = sorted(range(n), key=lambda i: (-float(scores[0, i]), i))[:k]
    assert got.indices[0].tolist() == sorted(want)
    assert ranking(scores)[0, :k].tolist() == want
    rest = [float(scores[0, i]) for i in range(n) if i not in want]
    margin = float(scores[0, want[-1]]) - max(rest) if rest and want else float("inf")
    assert got.margins[0].tolist() == [margin] * k


def test_top_k_counts_and_mask() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 3.0]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    got = top_k(scores, torch.tensor([1, 2]), valid=valid)
    assert got.indices.tolist() == [[1, -1], [1, 2]]
    assert got.margins.tolist() == [[1.0, float("inf")], [1.0, 1.0]]
    assert ranking(scores, valid).tolist() == [[1, 2, 0], [2, 1, 0]]
    assert ranking(torch.full((1, 3), -torch.inf), valid[:1]).tolist() == [[1, 2, 0]]


def test_top_k_of_several_rows() -> None:
    """All rows at once where none has a tie at the edge or a NaN, and one by one elsewhere."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 50, generator=generator)
    want = scores.argsort(dim=1, descending=True)[:, :7].sort(dim=1).values
    got = top_k(scores, 7)
    assert torch.equal(got.indices, want)
    edge = scores.sort(dim=1, descending=True).values
    torch.testing.assert_close(got.margins, (edge[:, 6:7] - edge[:, 7:8]).expand(-1, 7))
    tied = scores.clone()
    tied[2, 11:14] = 2.0
    assert top_k(tied, 2).indices[2].tolist() == [11, 12]
    assert top_k(tied, 2).margins[2].tolist() == [0.0, 0.0]
    for place in (0, 49):
        broken = scores.clone()
        broken[3, place] = torch.nan
        with pytest.raises(PruningError, match="NaN"):
            top_k(broken, 7)
