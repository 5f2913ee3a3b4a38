"""Budgets of whole prompts: `scope="prompt"`."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pruning_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiled_images import ALONE, STRIP, WIDE, tiled

from llava.pruning import PruningConfig, PruningError, RaggedTokens, prune_visual_tokens
from llava.pruning.proportions import share_in_proportion
from llava.pruning.tokens import Prompt


@pytest.mark.parametrize(
    ("total", "sizes", "most", "want"),
    [
        (8, [10, 30], [10, 30], [2, 6]),
        (10, [10, 30], [10, 30], [3, 7]),  # 2.5 and 7.5: the first of equal remainders
        (3, [1, 1, 100], [1, 1, 100], [1, 1, 1]),
        (50, [1, 1, 100], [1, 1, 100], [1, 1, 48]),
        (30, [10, 10, 40], [10, 10, 12], [9, 9, 12]),  # what the last cannot hold
        (99, [4, 5], [4, 5], [4, 5]),
        (4, [3, 9], [0, 9], [0, 4]),  # no place at all
        (7, [5, 5, 5], [5, 5, 5], [3, 2, 2]),
        (1, [576], [576], [1]),
    ],
)
def test_share_in_proportion(total, sizes, most, want) -> None:
    assert share_in_proportion(total, sizes, most) == want


@given(data=st.data(), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_shares_are_exact_and_fair(data, sizes) -> None:
    most = [data.draw(st.integers(1, size)) for size in sizes]
    total = data.draw(st.integers(len(sizes), sum(sizes) + 3))
    shares = share_in_proportion(total, sizes, most)
    assert sum(shares) == min(total, sum(most))
    assert all(1 <= share <= limit for share, limit in zip(shares, most, strict=True))
    # One token more for one and less for another is never nearer to proportion than a token.
    for gives, size, _ in zip(shares, sizes, most, strict=True):
        for takes, other, limit in zip(shares, sizes, most, strict=True):
            if gives > 1 and takes < limit:
                assert Fraction(gives - 1, size) < Fraction(takes + 1, other)
    quota = [Fraction(total * size, sum(sizes)) for size in sizes]
    if most == sizes and all(part >= 1 for part in quota) and total <= sum(sizes):
        assert all(abs(s - q) < 1 for s, q in zip(shares, quota, strict=True))


def test_counts_of_a_prompt() -> None:
    shared = PruningConfig("zoo", keep_tokens=40, scope="prompt")
    assert shared.num_kept_of_prompt([100, 300]) == [10, 30]
    assert PruningConfig("zoo", keep_tokens=40).num_kept_of_prompt([100, 300]) == [40, 40]
    assert shared.num_kept_of_prompt([10, 30]) == [10, 30]
    # Newlines go, so an image keeps at most its patches; the others get what it leaves.
    assert shared.num_kept_of_prompt([21, 21], [4, 21]) == [4, 21]
    ratio = PruningConfig("zoo", keep_ratio=0.1, scope="prompt")
    assert ratio.num_kept_of_prompt([100, 300]) == [10, 30]
    assert ratio.num_kept_of_prompt([1, 1, 1]) == [1, 1, 1]
    assert ratio.num_kept_of_prompt([3, 3, 40]) == [1, 1, 3]
    assert ratio.num_kept_of_prompt([0, 50]) == [0, 5]
    assert PruningConfig("none", keep_tokens=1, scope="prompt").num_kept_of_prompt([9, 9]) == [9, 9]
    few = PruningConfig("zoo", keep_tokens=2, scope="prompt")
    message = r"keep_tokens=2 is too small for the 3 images of a prompt.*keep at least 3"
    with pytest.raises(PruningError, match=message):
        few.num_kept_of_prompt([9, 9, 9])


def test_saved_and_refused() -> None:
    config = PruningConfig.of("zoo", keep_tokens=4, scope="prompt")
    assert config.to_dict() == {"method": "zoo", "keep_tokens": 4, "scope": "prompt"}
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert "scope" not in PruningConfig("zoo", keep_tokens=4).to_dict()
    assert PruningConfig("pool", keep_tokens=4, scope="prompt").scope == "prompt"
    with pytest.raises(PruningError, match="did you mean 'prompt'"):
        PruningConfig("zoo", keep_tokens=4, scope="promt")


@pytest.mark.parametrize("name", ["zoo", "random", "visionzip"])
def test_images_of_a_prompt_share_its_budget(name) -> None:
    """Each image is pruned as with its share alone; other prompts change nothing."""
    valid = torch.ones(4, checks.N, dtype=torch.bool)
    valid[1, 12:] = False
    visual = checks.visual_for(name, 4, valid=valid)
    config = PruningConfig(name, keep_tokens=16, scope="prompt")
    shared = replace(visual, shares=(range(0, 2), range(2, 2), range(2, 3), range(3, 4)))
    out = prune_visual_tokens(shared, config)
    assert out.trace.tokens_after == [12, 4, 16, 16]
    assert out.original_positions is False
    for image, budget in enumerate(out.trace.tokens_after):
        alone = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=budget))
        assert torch.equal(out.embeddings(image), alone.embeddings(image))
    # Without shares every image is a prompt, and where the budget is of images shares mean nothing.
    single = prune_visual_tokens(visual, config)
    assert single.trace.tokens_after == [16, 12, 16, 16]
    own = prune_visual_tokens(shared, PruningConfig(name, keep_tokens=16))
    assert own.trace.tokens_after == [16, 12, 16, 16]
    assert visual.take_images([1]).shares == shared.take_images([1]).shares == ()


def test_all_tokens_of_a_prompt_change_nothing() -> None:
    visual = replace(checks.make_visual(2), shares=(range(2),))
    config = PruningConfig("zoo", keep_tokens=2 * checks.N, scope="prompt")
    assert prune_visual_tokens(visual, config) is visual
    less = PruningConfig("zoo", keep_tokens=2 * checks.N - 1, scope="prompt")
    assert prune_visual_tokens(visual, less).trace.tokens_after == [checks.N, checks.N - 1]


def test_tiles_and_limits(caplog) -> None:
    visual = tiled(WIDE, STRIP, ALONE)
    lengths = visual.lengths()
    visual = replace(visual, shares=(range(3),), prompts=(Prompt((0, 1, 2), 40, 100),))
    config = PruningConfig("zoo", keep_tokens=50, scope="prompt")
    out = prune_visual_tokens(visual, config)
    assert sum(out.trace.tokens_after) == 50 and not caplog.records
    for share, length in zip(out.trace.tokens_after, lengths, strict=True):
        assert abs(share - 50 * length / sum(lengths)) < 1
    # What does not fit is lowered from the shares, not from the total.
    more = prune_visual_tokens(visual, replace(config, keep_tokens=90))
    assert sum(more.trace.tokens_after) == 60
    assert "leaves image 0 room for" in caplog.text
    every = sum(lengths)
    all_but_one = prune_visual_tokens(
        replace(visual, prompts=()), replace(config, keep_tokens=every - 1)
    )
    patches = [sum(layout.tile_sizes) for layout in (WIDE, STRIP, ALONE)]
    assert all_but_one.trace.tokens_after == patches
    released = replace(visual, tile_protocol="zoo-release")
    with pytest.raises(PruningError, match=r"'zoo-release' counts .* scope can only be 'image'"):
        prune_visual_tokens(released, config)


def test_a_budget_reaches_over_groups() -> None:
    images = [checks.visual_for("norm", 1, grid=grid) for grid in [(6, 6), (2, 6), (6, 6), (1, 1)]]
    ragged = replace(RaggedTokens.of(images), shares=(range(0, 2), range(2, 4)))
    config = PruningConfig("norm", keep_tokens=16, scope="prompt")
    assert prune_visual_tokens(ragged, config).trace.tokens_after == [12, 4, 15, 1]
    limited = replace(ragged, prompts=(Prompt((0, 1), 90, 100),))
    assert prune_visual_tokens(limited, config).trace.tokens_after == [6, 4, 15, 1]
    with pytest.raises(PruningError, match="too small for the 2 images"):
        prune_visual_tokens(ragged, replace(config, keep_tokens=1))
