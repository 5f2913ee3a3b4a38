"""Images of different grids in one batch, and tokens without a layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pruning_inputs import make_projector, make_visual, supply

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.engine.runner import kept_digest
from llava.model.splice import splice_prompts
from llava.pruning import (
    PruningConfig,
    PruningError,
    RaggedTokens,
    VisualTokens,
    get_method,
    list_methods,
    prune_visual_tokens,
)
from llava.pruning.layout import ImageLayout
from llava.pruning.tokens import ImageTokens, PrunedTokens
from llava.pruning.trace import PruningTrace
from llava.pruning.visualize import overlay_tokens

PROJECTOR = make_projector()
GRIDS = [(6, 6), (1, 1), (3, 4), (6, 6), (2, 8), (4, 3)]


def image_of(name: str, grid: tuple[int, int], seed: int = 0, tiles: int = 1) -> VisualTokens:
    """One image with what method `name` needs."""
    visual = make_visual(tiles, seed=seed, grid=grid, owners=[0] * tiles)
    return supply(replace(visual, projector=PROJECTOR), name)


def check_same(batch: ImageTokens, image: int, alone: ImageTokens) -> None:
    """An image of a batch is what it is alone."""
    assert torch.equal(batch.embeddings(image), alone.embeddings(0))
    got, want = batch.sequence(image), alone.sequence(0)
    assert got.total == want.total and (got.place is None) == (want.place is None)
    if want.place is not None:
        assert torch.equal(got.place, want.place)
    assert len(batch.tiles_of(image)) == len(alone.tiles_of(0))
    for tile, own in zip(batch.tiles_of(image), alone.tiles_of(0), strict=True):
        assert int(batch.image_index[tile]) == image
        if alone.kept is not None:
            row = batch.kept[tile]
            assert torch.equal(row[row >= 0], alone.kept[own][alone.kept[own] >= 0])
        if alone.sources is not None:
            assert batch.sources[tile].nonzero().tolist() == alone.sources[own].nonzero().tolist()


def check_images_alone(name: str, grids: list[tuple[int, int]], **choice: object) -> None:
    config = PruningConfig.of(name, **choice)
    images = [image_of(name, grid, seed) for seed, grid in enumerate(grids)]
    out = prune_visual_tokens(RaggedTokens.of(images), config)
    assert type(out) is RaggedTokens and out.num_images == len(grids)
    for number, image in enumerate(images):
        alone = prune_visual_tokens(image, config)
        check_same(out, number, alone)
        assert out.trace.tokens_before[number] == image.projected.shape[1]
        assert out.trace.tokens_after[number] == len(alone.embeddings(0))
        if alone.trace is not None:
            got, want = out.trace.margins[number], alone.trace.margins[0]
            assert torch.equal(got[got.isfinite()], want[want.isfinite()])
    assert (out.kept is None) == (out.trace.kept is None) == get_method(name).merges


@pytest.mark.parametrize("name", [name for name in list_methods() if get_method(name).budgeted])
def test_an_image_is_pruned_as_alone(name) -> None:
    check_images_alone(name, GRIDS, keep_tokens=4)


@pytest.mark.parametrize("name", ["zoo", "divprune"])
def test_selected_from_whole_images(name) -> None:
    check_images_alone(name, GRIDS, keep_ratio=0.3, allocation="global")


@given(
    grids=st.lists(
        st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 2), (4, 4)]), max_size=7, min_size=1
    ),
    keep=st.integers(1, 5),
    name=st.sampled_from(["norm", "random", "prumerge"]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_order_of_images(grids, keep, name, data) -> None:
    config = PruningConfig(name, keep_tokens=keep)
    images = [image_of(name, grid, seed) for seed, grid in enumerate(grids)]
    ragged = RaggedTokens.of(images)
    taken = data.draw(st.lists(st.integers(0, len(grids) - 1), min_size=1, max_size=8))
    alone = [prune_visual_tokens(image, config) for image in images]
    before, after = ragged.take_images(taken), prune_visual_tokens(ragged, config)
    assert before.lengths() == [images[image].projected.shape[1] for image in taken]
    assert before.tile_sizes() == before.lengths()
    later = after.take_images(taken)
    assert later.trace is None
    for place, image in enumerate(taken):
        check_same(before, place, images[image])
        check_same(later, place, alone[image])
        check_same(prune_visual_tokens(before, config), place, alone[image])


def test_images_of_one_grid_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image_of("zoo", grid, seed) for seed, grid in enumerate([(4, 4), (2, 3)] * 3)]
    ragged = RaggedTokens.of(images)
    assert [group.num_images for group in ragged.groups] == [3, 3]
    assert [ragged.images_of(group) for group in range(2)] == [[0, 2, 4], [1, 3, 5]]
    cls, calls = get_method("zoo"), []
    original = cls.select
    monkeypatch.setattr(cls, "select", lambda *given: calls.append(1) or original(*given))
    prune_visual_tokens(ragged, PruningConfig("zoo", keep_tokens=3))
    assert len(calls) == 2


def test_nothing_to_do_returns_the_same_object() -> None:
    ragged = RaggedTokens.of([image_of("zoo", grid) for grid in GRIDS])
    assert prune_visual_tokens(ragged, PruningConfig("zoo", keep_tokens=36)) is ragged
    assert prune_visual_tokens(ragged, None) is ragged
    assert ragged.kept is ragged.sources is ragged.trace is None
    one = RaggedTokens.of([image_of("zoo", (2, 2)), image_of("zoo", (1, 1))])
    out = prune_visual_tokens(one, PruningConfig("zoo", keep_tokens=3, allocation="global"))
    assert out.trace.tokens_after == [3, 1] and out.kept.tolist()[1] == [0, -1, -1]


@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_trace_of_tiles_and_images(allocation) -> None:
    images = [image_of("zoo", (3, 3), 1, tiles=3), image_of("zoo", (2, 2), 2, tiles=2)]
    images += [image_of("zoo", (3, 3), 3), image_of("zoo", (1, 1), 4, tiles=2)]
    config = PruningConfig("zoo", keep_tokens=4, allocation=allocation)
    out = prune_visual_tokens(RaggedTokens.of(images), config)
    trace = out.trace
    assert out.image_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert trace.margins.shape[0] == (8 if allocation == "per_tile" else 4)
    assert trace.kept.shape[0] == 8 and torch.equal(trace.kept, out.kept)
    assert trace.tokens_before == [27, 8, 9, 2] and trace.tokens_after == [4, 4, 4, 2]
    assert trace.score_seconds == sum(group.trace.score_seconds for group in out.groups) > 0
    for image in range(3):
        rows = out.tiles_of(image) if allocation == "per_tile" else [image]
        alone = prune_visual_tokens(images[image], config).trace
        got, want = trace.margins[rows], alone.margins
        assert torch.equal(got[:, : want.shape[1]], want)
        assert got[:, want.shape[1] :].isinf().all()
    assert trace.to_dict()["first_margin"][-1] is None


def test_places_in_a_prompt_are_told_to_groups() -> None:
    """`random` draws by the place of an image within its prompt."""
    images = [image_of("random", grid, 5) for grid in [(4, 4), (2, 8), (4, 4)]]
    config = PruningConfig("random", keep_tokens=5)
    ragged = RaggedTokens.of(images).with_extras({"image_position": [0, 1, 2]})
    assert ragged.extras["image_position"] == [0, 1, 2]
    digests = ragged.extras["image_digest"]
    assert digests == [image.extras["image_digest"][0] for image in images]
    out = prune_visual_tokens(ragged, config)
    for place, image in enumerate(images):
        told = image.with_extras({"image_position": [place]})
        check_same(out, place, prune_visual_tokens(told, config))
    assert out.kept[0].tolist() != out.kept[2].tolist()
    with pytest.raises(PruningError, match="needs 3 entries"):
        ragged.with_extras({"image_position": [0]})


@pytest.mark.parametrize("name", ["norm", "pool"])
def test_what_callers_ask_of_tokens(name) -> None:
    """Splicing, digests and settling take a ragged batch for any other."""
    images = [image_of(name, (4, 4), seed) for seed in range(2)]
    ragged, config = RaggedTokens.of(images), PruningConfig(name, keep_tokens=4)
    out, plain = (prune_visual_tokens(t, config) for t in (ragged, ragged.groups[0]))
    assert type(plain) is PrunedTokens
    assert [kept_digest(out, share) for share in ([0], [1], [0, 1])] == [
        kept_digest(plain, share) for share in ([0], [1], [0, 1])
    ]
    assert kept_digest(ragged, [0]) == "all"
    out.settle()
    ids = torch.tensor([3, IMAGE_TOKEN_INDEX, 4, IMAGE_TOKEN_INDEX])
    embed = torch.nn.Embedding(8, 14)
    rows = splice_prompts(out, [ids], [ids], embed)
    (want,) = splice_prompts(plain, [ids], [ids], embed)
    assert torch.equal(rows[0].embeds, want.embeds)


def test_boxes_of_rectangles() -> None:
    sizes = [(90, 40), (30, 70)]
    images = []
    for (width, height), grid in zip(sizes, [(4, 9), (7, 3)], strict=True):
        layout = ImageLayout(grid, base_box=(0.0, 0.0, float(width), float(height)))
        images.append(replace(image_of("norm", grid), layouts=(layout,)))
    out = prune_visual_tokens(RaggedTokens.of(images), PruningConfig("norm", keep_tokens=3))
    for image, (grid, size) in enumerate(zip([(4, 9), (7, 3)], sizes, strict=True)):
        rows, cols = grid
        for box, patch in zip(out.boxes(image), out.kept[image].tolist(), strict=True):
            row, col = divmod(patch, cols)
            assert box[:2] == pytest.approx((col * size[0] / cols, row * size[1] / rows))
        assert overlay_tokens(Image.new("RGB", size, "red"), out, image).size == size


def test_refusals() -> None:
    image = image_of("norm", (2, 2))
    pruned = prune_visual_tokens(RaggedTokens.of([image]), PruningConfig("norm", keep_tokens=1))
    with pytest.raises(PruningError, match="pruned already"):
        prune_visual_tokens(pruned, PruningConfig("norm", keep_tokens=1))
    with pytest.raises(PruningError, match="at least one image"):
        RaggedTokens.of([])
    with pytest.raises(PruningError, match="entry 1 has 2 images"):
        RaggedTokens.of([image, make_visual(2)])
    for places in ([(0, 0), (0, 0)], [], [(1, 0)]):
        with pytest.raises(PruningError, match="every image of every group exactly once"):
            RaggedTokens((image,), tuple(places))
    for wrong in (1, -1):
        for call in (pruned.embeddings, pruned.tiles_of, lambda i: pruned.take_images([i])):
            with pytest.raises(PruningError, match=f"no image {wrong}; this batch has 1"):
                call(wrong)
    with pytest.raises(PruningError, match="tile protocol 'native'"):
        RaggedTokens.of([replace(image, tile_protocol="spatial")])


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (2, 8), (5, 3)])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("name", [name for name in list_methods() if get_method(name).budgeted])
def test_tokens_without_a_layout(name, tiles, grid) -> None:
    """Any grid, tiles one after the other: exact counts, in order, out of the right tiles."""
    count = grid[0] * grid[1]
    visual = image_of(name, grid, tiles=tiles)
    for keep in {1, tiles, tiles * count - 1} - {0}:
        config = PruningConfig(name, keep_tokens=keep)
        try:
            out = prune_visual_tokens(visual, config)
        except PruningError as error:
            assert name == "pool" and "cannot make" in str(error)
            continue
        left = out.embeddings(0)
        if config.pruner.fixed_count:
            assert len(left) == config.num_kept(tiles * count)
        if keep >= tiles * count:
            assert out is visual
        elif out.kept is not None:
            place = out.sequence(0).place
            assert place.tolist() == sorted(set(place.tolist()))
            assert torch.equal(left, visual.projected.flatten(0, 1)[place])
        else:
            coordinates = torch.arange(tiles * count)[None]
            assert out.mean_place(0, coordinates).shape == (1, len(left))


MUTATIONS = {
    "numbers of the group for those of the batch": (
        RaggedTokens,
        "images_of",
        lambda self, group: [*range(self.groups[group].num_images)],
    ),
    "rows in the order of groups": (
        RaggedTokens,
        "_rows",
        lambda self: sorted((p.group, t) for p in self.places for t in [p.image]),
    ),
    "traces not joined": (PruningTrace, "join", classmethod(lambda cls, traces, *_: traces[0])),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_check_fails_under_mutation(mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = [(4, 4), (1, 1), (2, 3), (4, 4)]
    check_images_alone("norm", grids, keep_tokens=4)
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises((AssertionError, IndexError, PruningError)):
        check_images_alone("norm", grids, keep_tokens=4)
