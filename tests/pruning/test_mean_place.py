"""Coordinates of the tokens that are left: their own, or the mean of what was merged."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from pruning_checks import make_visual
from pruning_inputs import supply
from test_ragged import image_of
from test_tiled_images import ALONE, STRIP, WIDE, tiled

from llava.pruning import (
    PruningConfig,
    PruningError,
    RaggedTokens,
    VisualTokens,
    get_method,
    list_methods,
    prune_visual_tokens,
)
from llava.pruning.layout import NEWLINE
from llava.pruning.sequences import TokenSequence

MERGING = [name for name in list_methods() if get_method(name).merges]


def grid_of(rows: int, cols: int) -> torch.Tensor:
    """Time, row and column of every token: LongTensor [3, rows * cols]."""
    return torch.cartesian_prod(torch.tensor([5]), torch.arange(rows), torch.arange(cols)).T


def check_by_hand(visual: VisualTokens, config: PruningConfig, coordinates: torch.Tensor) -> None:
    """Every coordinate is the mean over sources in exact arithmetic, rounded half up."""
    out = prune_visual_tokens(visual, config)
    patches = visual.projected.shape[1]
    for image in range(visual.num_images):
        sequence = visual.sequence(image).source.tolist()
        own = coordinates[:, : len(sequence)]
        got = out.mean_place(image, own)
        assert got.dtype == torch.long
        want = []
        for entry in out.sequence(image).source.tolist():
            tile, slot = divmod(entry, out.projected.shape[1])
            made_of = out.sources[out.tiles_of(image)[tile], slot].nonzero().flatten().tolist()
            places = [sequence.index(tile * patches + patch) for patch in made_of]
            columns = own[:, places or list(range(len(sequence)))].tolist()
            half = Fraction(1, 2)
            want.append([floor(Fraction(sum(axis), len(axis)) + half) for axis in columns])
        assert got.T.tolist() == want


@pytest.mark.parametrize("name", MERGING)
def test_of_merged_tokens(name) -> None:
    """Also with padding, several tiles, crops, and pool's blocks of no whole number of rows."""
    generator = torch.Generator().manual_seed(1)
    coordinates = torch.randint(0, 10_000, (3, 400), generator=generator)
    config = PruningConfig(name, keep_tokens=12)
    check_by_hand(image_of(name, (6, 6), seed=1), config, coordinates)
    check_by_hand(image_of(name, (4, 8), seed=2, tiles=3), config, coordinates)
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[0, :12] = False
    check_by_hand(supply(make_visual(2, valid=valid), name), config, coordinates)
    if name != "pool":  # which cannot make every number of tokens out of a short tile
        visual = supply(tiled(WIDE, STRIP), name)
        check_by_hand(visual, PruningConfig(name, keep_tokens=60), coordinates)


def test_of_blocks() -> None:
    out = prune_visual_tokens(image_of("pool", (4, 4)), PruningConfig("pool", keep_tokens=4))
    # Means 0.5 and 2.5 of rows and of columns, rounded half up.
    assert out.mean_place(0, grid_of(4, 4)).tolist() == [[5] * 4, [1, 1, 3, 3], [1, 3, 1, 3]]


@pytest.mark.parametrize("name", ["zoo", "random"])
def test_of_selected_tokens(name) -> None:
    visual = image_of(name, (3, 5))
    out = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=6))
    grid = grid_of(3, 5)
    assert torch.equal(out.mean_place(0, grid), grid[:, out.kept[0]])
    assert torch.equal(visual.mean_place(0, grid), grid)
    layout = replace(ALONE, newline=True)
    whole = tiled(layout, WIDE)
    pruned = prune_visual_tokens(whole, PruningConfig("zoo", keep_tokens=40))
    own = torch.arange(37)[None]
    assert torch.equal(pruned.mean_place(0, own), own)  # stays whole, newline and all
    assert whole.sequence(0).source[-1] == NEWLINE


def test_over_groups_and_whole_images() -> None:
    images = [image_of("pool", grid, 1) for grid in [(4, 4), (1, 1), (4, 6)]]
    out = prune_visual_tokens(RaggedTokens.of(images), PruningConfig("pool", keep_tokens=4))
    assert out.mean_place(0, grid_of(4, 4))[1].tolist() == [1, 1, 3, 3]
    assert out.mean_place(1, grid_of(1, 1)).tolist() == [[5], [0], [0]]
    assert out.mean_place(2, grid_of(4, 6))[2].tolist() == [1, 4, 1, 4]
    with pytest.raises(
        PruningError, match=r"the image has 24 tokens .* \[axes, 24\], got \[3, 16\]"
    ):
        out.mean_place(2, grid_of(4, 4))


def test_large_numbers_are_exact() -> None:
    """Sums beyond what float32 holds."""
    sequence = TokenSequence(torch.tensor([0]), None, 5000)
    sources = torch.ones(1, 1, 5000, dtype=torch.bool)
    coordinates = torch.full((1, 5000), 2**24 + 1)
    assert sequence.mean_coordinates(sources, coordinates).tolist() == [[2**24 + 1]]


MUTATIONS = {
    "tokens of the other tile": lambda self, s, c: ORIGINAL(self, s.flip(0), c),
    "order of slots": lambda self, s, c: ORIGINAL(
        self._replace(source=self.source.sort().values), s, c
    ),
    "places of other patches": lambda self, s, c: ORIGINAL(
        self._replace(patch_place=None if self.patch_place is None else self.patch_place.flip(0)),
        *(s, c),
    ),
}
ORIGINAL = TokenSequence.mean_coordinates


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_check_fails_under_mutation(mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    test_of_merged_tokens("visionzip")
    monkeypatch.setattr(TokenSequence, "mean_coordinates", MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        test_of_merged_tokens("visionzip")
