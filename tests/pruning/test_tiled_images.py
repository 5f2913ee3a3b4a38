"""Images of several tiles: allocation, newlines, positions, the released protocol, batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_checks import make_projector
from pruning_inputs import supply

from llava.pruning import PruningConfig, PruningError, VisualTokens, prune_visual_tokens
from llava.pruning.layout import NEWLINE, ImageLayout
from llava.pruning.methods.zoo import Zoo
from llava.pruning.room import level
from llava.pruning.selection.max_min import max_min
from llava.pruning.tokens import Prompt

GRID, N = (6, 6), 36
# Two rows of crops without their first and last two rows; three crops in a row; the base alone.
WIDE = ImageLayout(GRID, crops=(2, 2), window=(2, 0, 8, 12), newline=True)
STRIP = ImageLayout(GRID, crops=(1, 3), window=(0, 4, 6, 10), newline=True)
ALONE = ImageLayout(GRID)
METHODS = ("zoo", "zoo-exact", "divprune", "norm", "random", "grid")


def tiled(*layouts: ImageLayout, seed: int = 0) -> VisualTokens:
    """Random tokens of one image per layout; an image's tokens depend on its layout alone."""
    tiles = []
    for layout in layouts:
        generator = torch.Generator().manual_seed(seed + layout.tiles)
        tiles.append(torch.randn(layout.tiles, N, 10, generator=generator))
    features = torch.cat(tiles)
    projector = make_projector()
    with torch.no_grad():
        projected = torch.stack([projector(row.clone()) for row in features])
    owners = torch.tensor([i for i, layout in enumerate(layouts) for _ in range(layout.tiles)])
    valid = torch.zeros(len(features) * N, dtype=torch.bool)
    first = 0
    for layout in layouts:
        valid[first + layout.sequence[layout.sequence != NEWLINE]] = True
        first += layout.tiles * N
    line = torch.randn(14, generator=torch.Generator().manual_seed(99))
    digests = [str(features[t].sum().item()) for t in range(len(features))]
    return VisualTokens(
        *(features, projected, projector, owners, GRID, valid.view(-1, N)),
        extras={"image_digest": digests},
        layouts=layouts,
        newline=line,
    )


def check_image(before: VisualTokens, after: VisualTokens, image: int, budget: int) -> None:
    """What is left is a part of what was there, in its order, at its places, exactly as many."""
    sequence = after.sequence(image)
    place = sequence.place.tolist()
    assert len(place) == budget and place == sorted(set(place))
    assert sequence.total == len(before.layouts[image].sequence)
    assert torch.equal(after.embeddings(image), before.embeddings(image)[place])
    assert after.trace.tokens_after[image] == budget
    kept = after.kept[after.tiles_of(image)]
    assert (kept >= 0).sum() == (before.layouts[image].sequence[place] != NEWLINE).sum()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("allocation", ["per_tile", "global"])
@pytest.mark.parametrize("newline", ["drop", "keep"])
@pytest.mark.parametrize("keep", [20, 77, 131])
def test_exact_counts(name, allocation, newline, keep) -> None:
    visual = tiled(WIDE, STRIP, ALONE)
    config = PruningConfig(name, keep_tokens=keep, allocation=allocation, newline=newline)
    pruned = prune_visual_tokens(visual, config)
    for image, layout in enumerate(visual.layouts):
        total = len(layout.sequence)
        if keep >= total:
            assert torch.equal(pruned.embeddings(image), visual.embeddings(image))
            continue
        want = min(keep, sum(layout.tile_sizes)) if newline == "drop" else keep
        assert config.num_kept(total, sum(layout.tile_sizes)) == want
        check_image(visual, pruned, image, want)
        left = layout.sequence[pruned.sequence(image).place]
        if newline == "drop":
            assert (left != NEWLINE).all()
            continue
        rows = layout.newline_grid(torch.arange(total))
        chosen = torch.isin(rows, pruned.sequence(image).place)
        assert chosen[chosen[:, :-1].any(dim=1), -1].all(), "a row with a patch lost its newline"
        spare = int((chosen[:, -1] & ~chosen[:, :-1].any(dim=1)).sum())
        assert spare <= (1 if name in ("zoo", "norm", "divprune", "zoo-exact") else len(rows))


def test_per_tile_shares() -> None:
    pruned = prune_visual_tokens(tiled(WIDE), PruningConfig("zoo", keep_tokens=63))
    assert (pruned.kept >= 0).sum(dim=1).tolist() == [15, 12, 12, 12, 12]
    everything = prune_visual_tokens(tiled(WIDE), PruningConfig("zoo", keep_tokens=134))
    # The base view holds 36 patches; what it and short crops cannot hold goes on in tile order.
    assert (everything.kept >= 0).sum(dim=1).tolist() == [36, 24, 24, 24, 24]


def test_global_is_one_choice_among_all_tokens() -> None:
    visual = tiled(WIDE)
    config = PruningConfig("divprune", keep_tokens=40, allocation="global")
    pruned = prune_visual_tokens(visual, config)
    sequence = WIDE.sequence[WIDE.sequence != NEWLINE]
    tokens = visual.projected.flatten(0, 1)[sequence]
    picks = max_min(tokens[None], 40, first="isolated")[0]
    assert torch.equal(pruned.embeddings(0), tokens[picks.sort().values])


def test_newlines_can_compete() -> None:
    visual = tiled(WIDE, STRIP)
    settings_ = {"allocation": "global", "newline": "select", "keep_tokens": 50}
    pruned = prune_visual_tokens(visual, PruningConfig("divprune", **settings_))
    for image in range(2):
        check_image(visual, pruned, image, 50)
        everything = visual.embeddings(image)
        picks = max_min(everything[None], 50, first="isolated")[0].sort().values
        assert torch.equal(pruned.sequence(image).place, picks)
    with pytest.raises(PruningError, match="a newline has no score"):
        prune_visual_tokens(visual, PruningConfig("zoo", **settings_))


def test_too_small_for_newlines() -> None:
    config = PruningConfig("zoo", keep_tokens=8, newline="keep")
    with pytest.raises(PruningError, match=r"reserves 8 tokens of image 0 .* keep at least 9"):
        prune_visual_tokens(tiled(WIDE), config)


@pytest.mark.parametrize("choice", [{"newline": "keep"}, {"positions": "original"}])
def test_merging_methods_have_no_places(choice) -> None:
    with pytest.raises(PruningError, match="makes new tokens"):
        PruningConfig("pool", keep_tokens=9, **choice)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *product(METHODS, [{}, {"allocation": "global"}, {"newline": "keep"}]),
        ("pool", {}),
    ],
)
def test_an_image_is_the_same_in_any_batch(name, choice) -> None:
    config = PruningConfig(name, keep_tokens=48 if name == "pool" else 45, **choice)
    layouts = (WIDE, ALONE, STRIP, WIDE, ALONE, STRIP)
    together = prune_visual_tokens(tiled(*layouts), config)
    for image, layout in enumerate(layouts):
        if layout is not ALONE:
            alone = prune_visual_tokens(tiled(layout), config)
            assert torch.equal(together.embeddings(image), alone.embeddings(0))
        else:
            assert torch.equal(together.embeddings(image), tiled(ALONE).embeddings(0))


@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_one_call_for_the_batch(allocation, monkeypatch) -> None:
    calls = []
    original = Zoo.select
    monkeypatch.setattr(Zoo, "select", lambda *a: calls.append(1) or original(*a))
    visual = tiled(WIDE, STRIP, WIDE, STRIP)
    config = PruningConfig("zoo", keep_tokens=30, allocation=allocation)
    prune_visual_tokens(visual, config)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["zoo", "pool"])
def test_taking_images_of_a_pruned_batch(name) -> None:
    visual = tiled(WIDE, ALONE, STRIP)
    pruned = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=40))
    taken = pruned.take_images([2, 0, 2])
    for position, image in enumerate((2, 0, 2)):
        assert torch.equal(taken.embeddings(position), pruned.embeddings(image))


def released(layout: ImageLayout) -> VisualTokens:
    return replace(tiled(layout), released=True)


@pytest.mark.parametrize("layout", [WIDE, STRIP])
@pytest.mark.parametrize("keep", [7, 40, 90])
def test_released_protocol_is_the_literal_index_arithmetic(layout, keep) -> None:
    """Per-tile picks, then one extra position a row, taken before the base view goes in front."""
    visual = released(layout)
    config = PruningConfig("divprune", keep_tokens=keep)
    share = keep // layout.tiles
    want = set()
    order = layout.sequence.tolist()
    for tile in range(layout.tiles):
        own = [i for i, token in enumerate(order) if token >= 0 and token // N == tile]
        tokens = visual.embeddings(0)[own]
        picks = max_min(tokens[None], min(share, len(own)), first="isolated")[0]
        want |= {own[i] for i in picks.tolist()}
    rows, width = layout.newline_rows
    want |= {row * (width + 1) + width for row in range(rows)}
    pruned = prune_visual_tokens(visual, config)
    assert pruned.sequence(0).place.tolist() == sorted(want)
    assert all(order[place] != NEWLINE for place in want), "no real newline survives"


def test_released_counts_of_a_vga_image() -> None:
    """640 x 480: budgets of 160 / 320 / 640 become 193 / 351 / 665 tokens, give or take a few.

    36 rows add a token each; those that the selection had kept anyway do not count twice. With
    picks at random that is 2.5, 4.9 and 9.9 on average, so the figures belong to one draw.
    """
    layout = ImageLayout((24, 24), crops=(2, 2), window=(6, 0, 36, 48), newline=True)
    assert len(layout.sequence) == 2340
    tokens = torch.randn(5, 576, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.zeros(5 * 576, dtype=torch.bool)
    valid[layout.sequence[layout.sequence != NEWLINE]] = True
    visual = VisualTokens(
        *(tokens, tokens, torch.nn.Identity(), torch.zeros(5, dtype=torch.long), (24, 24)),
        valid=valid.view(5, 576),
        extras={"image_digest": ["a"] * 5},
        layouts=(layout,),
        newline=torch.ones(4),
        released=True,
    )

    def counts(seed: int) -> list[int]:
        configs = [
            PruningConfig("random", keep_tokens=keep, options={"seed": seed})
            for keep in (160, 320, 640)
        ]
        return [prune_visual_tokens(visual, c).trace.tokens_after[0] for c in configs]

    assert counts(143) == [193, 351, 665]
    mean = torch.tensor([counts(seed) for seed in range(30)]).double().mean(dim=0)
    assert (mean - torch.tensor([193.5, 351.1, 666.2])).abs().max() < 1.5


def test_released_budgets() -> None:
    # A share of five full tiles whatever the image has, cut off twice.
    pruned = prune_visual_tokens(released(STRIP), PruningConfig("zoo", keep_ratio=0.25))
    counts = (tiled_counts := (pruned.kept >= 0).sum(dim=1)).tolist()
    assert int(5 * N * 0.25) // 4 == 11 and min(counts) >= 11
    assert tiled_counts.sum() <= 4 * 11 + STRIP.newline_rows[0]
    with pytest.raises(PruningError, match="leave none for a tile"):
        prune_visual_tokens(released(WIDE), PruningConfig("zoo", keep_tokens=4))
    for choice in ({"allocation": "global"}, {"newline": "keep"}):
        with pytest.raises(PruningError, match="'zoo-release' selects in every tile"):
            prune_visual_tokens(released(WIDE), PruningConfig("zoo", keep_tokens=40, **choice))
    with pytest.raises(PruningError, match="it needs a method that selects"):
        prune_visual_tokens(released(WIDE), PruningConfig("pool", keep_tokens=40))


@given(room=st.integers(0, 60), most=st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_level(room, most) -> None:
    shares = level(room, most)
    assert sum(shares) == min(room, sum(most))
    assert all(0 <= share <= want for share, want in zip(shares, most, strict=True))
    cut = [share for share, want in zip(shares, most, strict=True) if share < want]
    assert not cut or max(shares) - min(cut) <= 1


@pytest.mark.parametrize("name", ["zoo", "divprune"])
def test_prompts_share_their_room(name, caplog) -> None:
    visual = tiled(WIDE, STRIP, WIDE)
    config = PruningConfig(name, keep_tokens=50)
    visual = replace(visual, prompts=(Prompt((0, 1), 39, 100), Prompt((2,), 30, 100)))
    assert prune_visual_tokens(visual, config).trace.tokens_after == [30, 31, 50]
    assert [(r.levelname, r.getMessage().partition(";")[0]) for r in caplog.records] == [
        (
            "WARNING",
            "tokenizer_model_max_length is 100 and leaves image 0 room for 30 of 50 tokens beside "
            "39 of text, image 1 room for 31 of 50 tokens beside 39 of text",
        )
    ]
    caplog.clear()
    limited = replace(released(WIDE), prompts=(Prompt((0,), 60, 100),))
    assert prune_visual_tokens(limited, config).trace.tokens_after[0] <= 40
    assert len(caplog.records) == 1


def test_every_image_keeps_a_token_however_long_its_prompt(caplog) -> None:
    visual = tiled(*[ALONE] * 5)
    visual = replace(visual, prompts=(Prompt(tuple(range(5)), 400, 100),))
    pruned = prune_visual_tokens(visual, PruningConfig("zoo", keep_tokens=7))
    assert pruned.trace.tokens_after == [1] * 5
    (record,) = caplog.records
    assert "image 2 room for 1 of 7 tokens" in record.getMessage()
    assert "image 3" not in record.getMessage()
    assert "2 more images less than was asked" in record.getMessage()


@pytest.mark.parametrize(
    ("visual", "setting", "own"),
    [
        (tiled(ALONE), {"method": "pool", "keep_tokens": 12}, r"pool cannot make 11 .* 10 and 12"),
        (tiled(WIDE), {"method": "zoo", "keep_tokens": 50, "newline": "keep"}, "reserves 8 tokens"),
        (replace(tiled(WIDE), released=True), {"method": "zoo", "keep_tokens": 50}, "leave none"),
    ],
    ids=["pool", "newline", "released"],
)
def test_a_budget_that_nobody_asked_for_names_what_lowered_it(visual, setting, own) -> None:
    room = 11 if setting["method"] == "pool" else 8
    visual = replace(visual, prompts=(Prompt((0,), 100 - room, 100),))
    cause = (
        rf"{own}.*\(tokenizer_model_max_length is 100 and leaves image 0 room for {room} of \d+ "
        rf"tokens beside {100 - room} of text; keep fewer tokens or shorten the prompt\)"
    )
    with pytest.raises(PruningError, match=cause):
        prune_visual_tokens(visual, PruningConfig.from_dict(setting))


@pytest.mark.parametrize("name", ["pool", "visionzip", "zoo"])
def test_a_budget_of_all_patches_only_drops_newlines(name) -> None:
    layout = replace(ALONE, newline=True)
    visual = tiled(layout)
    pruned = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=N))
    assert torch.equal(pruned.embeddings(0), visual.embeddings(0)[:N])
    assert pruned.trace.tokens_after == [N]


def test_gradients_reach_kept_tokens_and_newlines() -> None:
    visual = tiled(WIDE)
    visual.projected.requires_grad_()
    visual.newline.requires_grad_()
    config = PruningConfig("zoo", keep_tokens=40, newline="keep")
    prune_visual_tokens(visual, config).embeddings(0).sum().backward()
    assert visual.newline.grad.abs().sum() > 0
    assert (visual.projected.grad.abs().sum(dim=-1) > 0).sum() < 40


@pytest.mark.parametrize(
    ("name", "budget", "counts"),
    [
        # A fifth for every tile, however many there are; at most all of it.
        ("divprune", {"keep_tokens": 40}, [8] * 5 + [8] * 4),
        ("divprune", {"keep_tokens": 44}, [8] * 5 + [8] * 4),
        ("divprune", {"keep_ratio": 0.5}, [18] * 9),
        ("mmtok", {"keep_tokens": 40}, [8] * 9),
        ("visionzip", {"keep_tokens": 40}, [8] * 9),
        ("fastervlm", {"keep_tokens": 40}, [8] * 9),
        # One number for all tiles there are.
        ("hiprune", {"keep_tokens": 42}, [8] * 5 + [10] * 4),
        ("scope", {"keep_tokens": 42}, [8] * 5 + [10] * 4),
    ],
)
def test_budgets_of_every_tile(name: str, budget: dict, counts: list[int]) -> None:
    whole = [replace(layout, window=None, newline=False) for layout in (WIDE, STRIP)]
    visual = supply(replace(tiled(*whole), valid=None, newline=None, tile_budgets=True), name)
    config = PruningConfig.of(name, **budget)
    out = prune_visual_tokens(visual, config)
    assert out.valid.sum(dim=1).tolist() == counts
    alone = prune_visual_tokens(visual.take_images([1]), config)
    assert torch.equal(alone.embeddings(0), out.embeddings(1))
    few = PruningConfig.of(name, keep_tokens=3)
    with pytest.raises(PruningError, match=r"'spatial' keeps.*leave none; keep at least [45]"):
        prune_visual_tokens(visual, few)
    plenty = PruningConfig.of(name, keep_tokens=5 * N)
    assert prune_visual_tokens(visual, plenty) is visual
    # An image of one tile, and a method without a budget, are as always.
    single = supply(replace(tiled(ALONE), tile_budgets=True), name)
    assert prune_visual_tokens(single, PruningConfig.of(name, keep_tokens=9)).valid.sum() == 9
    assert prune_visual_tokens(visual, PruningConfig()) is visual
