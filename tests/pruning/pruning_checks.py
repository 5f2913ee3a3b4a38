"""Promises of llava.pruning as functions: the suite runs them, planted mutations must fail them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pruning_inputs import GRID, N, replace_tokens, supply, visual_for
from pruning_inputs import make_projector as make_projector  # other test files read them here
from pruning_inputs import make_visual as make_visual
from torch import Tensor, nn

from llava.pruning import (
    PruningConfig,
    PruningError,
    VisualTokens,
    get_method,
    max_min,
    prune_visual_tokens,
    register,
    registry,
)

# Budgets below N that a method refuses on a 6 x 6 grid, and says so: 35 has no factors that fit.
REFUSED = {"pool": (N - 1,)}


@contextmanager
def registered(cls: type) -> Iterator[str]:
    """The name of `cls`, which is a registered method inside the block only."""
    registry.list_methods()  # built-in methods first, or they would be loaded inside
    register(cls)
    try:
        yield cls.name
    finally:
        del registry.METHODS._entries[cls.name]


def chosen(out: VisualTokens, image: int) -> set[Any]:
    """The indices kept of a single-tile image; of a merging method, what every output is made of.

    The same for a batch that was left as it is: then every token.
    """
    if out.kept is not None:
        return set(out.kept[image].tolist()) - {-1}
    if out.sources is None:
        return set(range(N))
    rows = [frozenset(row.nonzero()[:, 0].tolist()) for row in out.sources[image]]
    return {row for row in rows if row}


def check_count_and_order(name: str, keep: int = 9) -> None:
    """Promise 2: exactly num_kept sorted, unique, in-range indices; embeddings aligned."""
    visual = visual_for(name, 3)
    config = PruningConfig(name, keep_tokens=keep)
    out = prune_visual_tokens(visual, config)
    for image in range(3):
        assert out.embeddings(image).shape[0] == config.num_kept(N)
        if not get_method(name).budgeted:
            assert out is visual
            continue
        assert config.num_kept(N) == keep
        assert out.trace is not None
        assert out.trace.tokens_before == [N] * 3
        assert out.trace.tokens_after == [keep] * 3
        if out.kept is None:
            assert out.sources is not None
            # The class token, where a method keeps it, was made of no patch.
            lone = int("cls_feature" in config.pruner.needs)
            assert int((~out.sources[image].any(dim=1)).sum()) == lone
            continue
        row = out.kept[image]
        assert row.tolist() == sorted(set(row.tolist()))
        assert int(row.min()) >= 0
        assert int(row.max()) < N
        assert torch.equal(out.embeddings(image), visual.projected[image][row])


def check_smallest_and_largest_budgets(name: str) -> None:
    """k = 1 and k just below N are met exactly, or refused where REFUSED says so."""
    visual = visual_for(name, 1)
    for keep in (1, N - 6, N - 1):
        config = PruningConfig(name, keep_tokens=keep)
        if keep in REFUSED.get(name, ()):
            with pytest.raises(PruningError):
                prune_visual_tokens(visual, config)
            continue
        tokens = prune_visual_tokens(visual, config).embeddings(0)
        assert tokens.shape[0] == (keep if get_method(name).budgeted else N)


def check_budget_of_all_tokens(name: str) -> None:
    """k = N and N < k: the same object comes back, and not even a NaN is looked at."""
    visual = visual_for(name)
    visual.projected[0, 0, 0] = torch.nan
    for keep in (N, N + 1, 10_000):
        assert prune_visual_tokens(visual, PruningConfig(name, keep_tokens=keep)) is visual


def check_valid_respected(name: str) -> None:
    """Padding is never kept, never compared with, and its content changes nothing."""
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, :2] = False
    valid[0, :, 5] = False  # a 4 x 5 rectangle stays
    valid[1, 5] = False
    visual = visual_for(name, 2, valid=valid.view(2, N))
    # Finite garbage, because a NaN could be refused instead of being skipped; then NaN and inf.
    for low, high in ((-50.0, 50.0), (torch.nan, torch.inf)):
        garbage = visual_for(name, 2, valid=valid.view(2, N))
        garbage.features[~garbage.valid] = low
        garbage.projected[~garbage.valid] = high
        for value in garbage.extras.values():
            for tile, mask in zip(value, garbage.valid, strict=True):
                if isinstance(tile, Tensor) and tile.shape[:1] == (N,):
                    tile[~mask] = high
        for keep in (4, 10, 25):
            config = PruningConfig(name, keep_tokens=keep)
            out, other = prune_visual_tokens(visual, config), prune_visual_tokens(garbage, config)
            for image, size in enumerate((20, 30)):
                tokens = out.embeddings(image)
                assert tokens.shape[0] == config.num_kept(size)
                assert torch.equal(tokens, other.embeddings(image)), (
                    "what padding holds changes the tokens that are kept; compute over "
                    "tokens.valid_mask() only"
                )
                if out.kept is not None:
                    kept = out.kept[image][out.kept[image] >= 0]
                    assert visual.valid[image][kept].all()


def check_batch_independence(name: str) -> None:
    """Promise 3: the same tokens alone, in a batch of 5 and in another order."""
    valid = torch.ones(5, N, dtype=torch.bool)
    valid[3, 24:] = False
    visual = visual_for(name, 5, valid=valid, seed=3)
    config = PruningConfig(name, keep_tokens=9)
    batch = prune_visual_tokens(visual, config)
    flipped = prune_visual_tokens(visual.take_images([4, 3, 2, 1, 0]), config)
    for image in range(5):
        alone = prune_visual_tokens(visual.take_images([image]), config)
        assert torch.equal(batch.embeddings(image), alone.embeddings(0))
        assert torch.equal(batch.embeddings(image), flipped.embeddings(4 - image))
        if batch.kept is not None:
            assert torch.equal(batch.kept[image], alone.kept[0])


def check_deterministic(name: str) -> None:
    """Promise 4: no global random state is read or written, call order does not matter."""
    visual, config = visual_for(name), PruningConfig(name, keep_tokens=9)
    torch.manual_seed(1)
    first = prune_visual_tokens(visual, config)
    torch.manual_seed(2)
    prune_visual_tokens(visual_for(name, 3, seed=9), PruningConfig(name, keep_tokens=5))
    # Drawn from, so that no generator stands where a seed would put it.
    torch.rand(1), np.random.random(), random.random()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    second = prune_visual_tokens(visual, config)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]
    for image in range(2):
        assert torch.equal(first.embeddings(image), second.embeddings(image))


def check_model_untouched(name: str) -> None:
    """Weights, buffers, gradients, training flags of the projector and all inputs stay as is."""
    visual = visual_for(name)
    visual.projector.append(nn.Dropout(0.5))
    visual.projector[0].eval()
    before = {key: value.clone() for key, value in visual.projector.state_dict().items()}
    flags = [module.training for module in visual.projector.modules()]
    features, projected = visual.features.clone(), visual.projected.clone()
    extras = supply(visual, name).extras
    prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9))
    after = visual.projector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert flags == [module.training for module in visual.projector.modules()]
    assert all(p.grad is None for p in visual.projector.parameters())
    assert torch.equal(features, visual.features)
    assert torch.equal(projected, visual.projected)
    torch.testing.assert_close(visual.extras, extras, rtol=0, atol=0)


def check_declared_needs(name: str) -> None:
    """What a method does not name in `needs` has no part in its choice."""
    visual, config = visual_for(name), PruningConfig(name, keep_tokens=9)
    other = replace(visual)
    if "features" not in config.pruner.needs:
        other.features = visual.features.flip(1) + 1
    if "projector" not in config.pruner.needs:
        other.projector = nn.Module()  # has no forward
    want, got = prune_visual_tokens(visual, config), prune_visual_tokens(other, config)
    for image in range(2):
        assert torch.equal(want.embeddings(image), got.embeddings(image))


def check_equivariance(name: str) -> None:
    """What a method says of places in `equivariant` is true, whichever it says."""
    if get_method(name).equivariant:
        check_permutation(name)
        return
    with pytest.raises(AssertionError):
        check_permutation(name)


def check_permutation(name: str) -> None:
    """Permuting tokens permutes the choice (margins are checked, so rounding cannot decide).

    Once on the suite's grid with a budget below the rank of the features, beyond which a
    determinant has nothing left to tell apart; and once on a grid and with a budget large enough
    for what a method does with places to decide over a token (HiPrune: from 26 on).
    """
    for grid, keep in ((GRID, 9), ((12, 12), 40)):
        _check_permutation(name, grid, keep)


def _check_permutation(name: str, grid: tuple[int, int], keep: int) -> None:
    visual = visual_for(name, 1, dtype=torch.float64, seed=5, grid=grid)
    config = PruningConfig(name, keep_tokens=keep)
    out = prune_visual_tokens(visual, config)
    order = torch.randperm(visual.features.shape[1], generator=torch.Generator().manual_seed(1))
    moved = replace_tokens(visual, visual.features[:, order], name)
    shuffled = prune_visual_tokens(moved, config)
    if out.kept is None:
        want, got = (
            tokens.embeddings(0)[tokens.embeddings(0)[:, 0].argsort()] for tokens in (out, shuffled)
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        return
    margins = out.trace.margins[out.trace.margins.isfinite()]
    # DivPrune's first pick is one of two mutually nearest tokens or a lone one: exclude the tie.
    assert (margins > 1e-9).all()
    assert set(order[shuffled.kept[0]].tolist()) == chosen(out, 0)


def check_duplicates(name: str) -> None:
    """Repeated tokens are never picked twice by index; the count stays exact."""
    visual = visual_for(name, 1)
    features = visual.features[:, :4].repeat(1, N // 4, 1)
    config = PruningConfig(name, keep_tokens=12)
    out = prune_visual_tokens(replace_tokens(visual, features, name), config)
    assert out.embeddings(0).shape[0] == config.num_kept(N)
    if out.kept is not None:
        assert len(set(out.kept[0].tolist())) == 12


def check_constant_features(name: str) -> None:
    """All tokens equal: still an exact count of distinct tokens, and no NaN."""
    visual = visual_for(name, 1)
    same = visual.features[:, :1].expand(-1, N, -1).clone()
    config = PruningConfig(name, keep_tokens=6)
    out = prune_visual_tokens(replace_tokens(visual, same, name), config)
    assert out.embeddings(0).isfinite().all()
    assert out.embeddings(0).shape[0] == config.num_kept(N)


def check_non_finite_refused(name: str) -> None:
    """NaN and inf are refused by tile and token, whichever side of the projector they are on.

    So they are in all else that the method reads.
    """
    for where in ("features", "projected"):
        for value in (torch.nan, torch.inf):
            visual = visual_for(name)
            getattr(visual, where)[1, 5, 0] = value
            with pytest.raises(PruningError, match=f"{where} of tile 1, token 5"):
                prune_visual_tokens(visual, PruningConfig(name, keep_tokens=4))
    for key, entries in visual_for(name).extras.items():
        if isinstance(entries[1], Tensor):
            visual = visual_for(name)
            visual.extras[key][1][..., 0] = torch.nan
            with pytest.raises(PruningError, match="NaN"):
                prune_visual_tokens(visual, PruningConfig(name, keep_tokens=4))


def check_half_precision(name: str) -> None:
    """bfloat16 and float16 tokens keep their type, and most of the choice made in float32.

    The tokens are the same numbers in both, so that only the method's own arithmetic can differ.
    """
    for dtype in (torch.bfloat16, torch.float16):
        half = visual_for(name, dtype=dtype)
        exact = supply(
            replace(
                half,
                features=half.features.float(),
                projected=half.projected.float(),
                projector=copy.deepcopy(half.projector).float(),
            ),
            name,
        )
        config = PruningConfig(name, keep_tokens=12)
        got, want = prune_visual_tokens(half, config), prune_visual_tokens(exact, config)
        assert got.projected.dtype == dtype
        for image in range(2):
            assert got.embeddings(image).shape[0] == config.num_kept(N)
            same = chosen(got, image) & chosen(want, image)
            assert len(same) >= 0.75 * len(chosen(want, image))


# What every method promises; what every method that removes tokens promises; and what every one
# promises that does not declare `equivariant = False`.
PROMISES = (
    check_count_and_order,
    check_smallest_and_largest_budgets,
    check_budget_of_all_tokens,
    check_valid_respected,
    check_batch_independence,
    check_deterministic,
    check_model_untouched,
    check_declared_needs,
    check_duplicates,
    check_constant_features,
    check_half_precision,
)
ALL = (*PROMISES, check_non_finite_refused, check_permutation)


def check_ties_to_lowest() -> None:
    """Equal scores go to the lowest index, at every pick."""
    z = torch.ones(1, 8, 4)
    for first in ("importance", "isolated"):
        assert max_min(z, 5, first=first).tolist() == [[0, 1, 2, 3, 4]]
    weights = torch.tensor([[0.2, 0.9, 0.9, 0.1, 0.9, 0.0, 0.0, 0.0]])
    axes = torch.eye(8)[None]
    assert max_min(axes, 4, weights=weights).tolist() == [[1, 2, 4, 0]]


def brute_force(
    z: Tensor, k: int, weights: Tensor | None, valid: Tensor | None, first: str
) -> list[int]:
    """Max-min selection of one row in float64, as written in the papers: no running state."""
    tokens = [i for i in range(len(z)) if valid is None or bool(valid[i])]
    rows = z.double().numpy()
    w = np.ones(len(z)) if weights is None else weights.double().numpy()

    def distance(i: int, j: int) -> float:
        norms = max(np.linalg.norm(rows[i]), 1e-12) * max(np.linalg.norm(rows[j]), 1e-12)
        return min(max(1.0 - float(rows[i] @ rows[j]) / norms, 0.0), 2.0)

    picked: list[int] = []
    while len(picked) < k:
        rest = [i for i in tokens if i not in picked]
        if picked:
            scores = [w[i] * min(distance(i, j) for j in picked) for i in rest]
        elif first == "importance":
            scores = [w[i] for i in rest]
        else:
            scores = [min((distance(i, j) for j in tokens if j != i), default=0.0) for i in rest]
        picked.append(rest[int(np.argmax(scores))])
    return picked


def check_brute_force() -> None:
    """Promise 6: the torch reference equals the brute force, batched, weighted and masked."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(5, 23, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 23, generator=generator, dtype=torch.float64)
    valid = torch.rand(5, 23, generator=generator) > 0.3
    counts = torch.tensor([1, 5, 0, 12, 9])
    for first, w in (("importance", weights), ("isolated", None), ("isolated", weights)):
        got = max_min(z, counts, weights=w, valid=valid, first=first)
        for row, count in enumerate(counts.tolist()):
            want = brute_force(z[row], count, None if w is None else w[row], valid[row], first)
            assert got[row, :count].tolist() == want
            assert (got[row, count:] == -1).all()
