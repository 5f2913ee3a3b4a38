"""Budgets per tile, compaction, the trace, and the context manager."""

from __future__ import annotations

import json

import pruning_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.pruning import PruningConfig, PruningError, VisualTokens, prune, prune_visual_tokens
from llava.pruning.active import Prunable
from llava.pruning.allocation.budgets import share_out
from llava.pruning.stage import importance_of
from llava.pruning.tokens import PrunedTokens


@pytest.mark.parametrize(
    ("budget", "capacity", "want"),
    [
        (64, [576], [64]),
        (160, [576] * 5, [32] * 5),
        (163, [576] * 5, [35, 32, 32, 32, 32]),
        (3, [576] * 5, [3, 0, 0, 0, 0]),
        (50, [10, 3, 30, 30], [10, 3, 25, 12]),
        (20, [2, 2, 2], [2, 2, 2]),
        (9, [0, 6, 6], [0, 6, 3]),
        (0, [4, 4], [0, 0]),
        (5, [], []),
    ],
)
def test_share_out(budget, capacity, want) -> None:
    assert share_out(budget, capacity) == want


@given(budget=st.integers(0, 400), capacity=st.lists(st.integers(0, 60), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_share_out_spends_the_budget(budget, capacity) -> None:
    shares = share_out(budget, capacity)
    assert sum(shares) == min(budget, sum(capacity))
    assert all(0 <= share <= room for share, room in zip(shares, capacity, strict=True))


@pytest.mark.parametrize("name", ["zoo", "divprune", "random", "grid", "zoo-exact", "norm"])
def test_tiles_of_several_images(name) -> None:
    """Three images with 1, 3 and 2 tiles, one of them short, one empty."""
    valid = torch.ones(6, checks.N, dtype=torch.bool)
    valid[2, 4:] = False
    valid[5] = False
    visual = checks.make_visual(6, owners=[0, 1, 1, 1, 2, 2], valid=valid)
    config = PruningConfig(name, keep_tokens=20)
    out = prune_visual_tokens(visual, config)
    assert [(row >= 0).sum().item() for row in out.kept] == [20, 10, 4, 6, 20, 0]
    assert torch.equal(out.valid, out.kept >= 0)
    assert out.trace.tokens_before == [36, 76, 36]
    assert out.trace.tokens_after == [20, 20, 20]
    assert (out.projected[~out.valid] == 0).all()
    for image, tiles in enumerate(([0], [1, 2, 3], [4, 5])):
        parts = [visual.projected[t][out.kept[t][out.kept[t] >= 0]] for t in tiles]
        assert torch.equal(out.embeddings(image), torch.cat(parts))
    # An image is pruned the same whatever else is in the batch.
    one = VisualTokens(
        visual.features[1:4].clone(),
        visual.projected[1:4].clone(),
        visual.projector,
        torch.zeros(3, dtype=torch.long),
        visual.grid,
        valid[1:4],
    )
    assert torch.equal(prune_visual_tokens(one, config).embeddings(0), out.embeddings(1))


@pytest.mark.parametrize("name", ["zoo", "pool"])
def test_image_below_the_budget_stays_whole(name) -> None:
    valid = torch.ones(2, checks.N, dtype=torch.bool)
    valid[0, 6:] = False
    visual = checks.make_visual(2, valid=valid)
    out = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=12))
    assert torch.equal(out.embeddings(0), visual.projected[0, :6])
    assert out.embeddings(1).shape[0] == 12
    assert out.trace.tokens_after == [6, 12]
    if name == "pool":
        assert torch.equal(out.sources[0, :6], torch.eye(6, checks.N, dtype=torch.bool))


def test_ratio_is_of_each_image() -> None:
    valid = torch.ones(2, checks.N, dtype=torch.bool)
    valid[1, 10:] = False
    out = prune_visual_tokens(
        checks.make_visual(2, valid=valid), PruningConfig("norm", keep_ratio=0.25)
    )
    assert out.trace.tokens_after == [9, 2]


def test_nothing_to_do_returns_the_same_object() -> None:
    visual = checks.make_visual(2)
    for config in (None, PruningConfig(), PruningConfig("zoo", keep_ratio=1.0)):
        assert prune_visual_tokens(visual, config) is visual
    assert visual.trace is None
    assert torch.equal(visual.embeddings(1), visual.projected[1])


def test_what_was_encoded_and_what_is_left() -> None:
    visual = checks.make_visual(2)
    for name in ("zoo", "pool"):
        out = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9))
        assert type(out) is PrunedTokens
        assert (out.kept is None) == (name == "pool") == (out.sources is not None)
        assert type(out.take_images([1])) is PrunedTokens and out.take_images([1]).trace is None
    assert type(visual.take_images([1])) is VisualTokens
    assert visual.kept is visual.sources is visual.trace is None


def test_trace() -> None:
    visual = checks.make_visual(2)
    out = prune_visual_tokens(visual, PruningConfig("zoo", keep_tokens=5))
    trace = out.trace
    assert torch.equal(trace.kept, out.kept)
    assert trace.margins.shape == (2, 5)
    assert torch.equal(trace.first_margin, trace.margins[:, 0])
    assert torch.equal(trace.last_margin, trace.margins[:, -1])
    assert trace.score_seconds > 0
    assert trace.select_seconds > 0
    data = json.loads(json.dumps(trace.to_dict()))
    assert data["method"] == "zoo"
    assert data["kept"] == out.kept.tolist()
    unscored = prune_visual_tokens(visual, PruningConfig("grid", keep_tokens=4)).trace.to_dict()
    assert unscored["first_margin"] == unscored["last_margin"] == [None, None]


def test_wrong_shapes_are_refused() -> None:
    visual = checks.make_visual(2)
    good = {
        "features": visual.features,
        "projected": visual.projected,
        "projector": visual.projector,
        "image_index": visual.image_index,
        "grid": visual.grid,
    }
    VisualTokens(**good)
    for change, message in (
        ({"features": visual.features[:1]}, "share tiles"),
        ({"image_index": torch.zeros(3)}, "image_index"),
        ({"grid": (5, 7)}, "grid"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, "valid"),
    ):
        with pytest.raises(PruningError, match=message):
            VisualTokens(**{**good, **change})
    with pytest.raises(PruningError, match="no image 2"):
        visual.embeddings(2)


class Model(Prunable):
    """The smallest thing that can be pruned."""


def test_prune_restores_the_previous_setting() -> None:
    model = Model()
    model.pruning = before = PruningConfig("grid", keep_tokens=4)
    with prune(model, "zoo", keep_tokens=64, seed=3) as run:
        assert model.pruning is run.config
        assert run.config == PruningConfig("zoo", keep_tokens=64, options={"seed": 3})
        with prune(model):
            assert model.pruning is None
        assert model.pruning is run.config
    assert model.pruning is before
    with pytest.raises(KeyError), prune(model, PruningConfig("norm", keep_ratio=0.5)):
        raise KeyError
    assert model.pruning is before


def test_prune_refuses_what_it_cannot_set() -> None:
    with (
        pytest.raises(PruningError, match="object is not a model that can be pruned"),
        prune(object(), "none"),
    ):
        pass
    with pytest.raises(PruningError, match="keep_tokens: settings go with a method name"):
        prune(Model(), keep_tokens=3).__enter__()
    model = Model()
    with pytest.raises(PruningError, match="did you mean 'zoo'"), prune(model, "zo", keep_tokens=3):
        pass
    assert model.pruning is None


def test_the_stage_tells_a_method_how_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PruningConfig("zoo-exact", keep_tokens=9, compute="bf16")
    visual, seen = checks.make_visual(1), []
    cls, score = type(config.pruner), type(config.pruner).score

    def spy(self, tokens):
        seen.append(tokens.compute)
        return score(self, tokens)

    monkeypatch.setattr(cls, "score", spy)
    prune_visual_tokens(visual, config)
    rounded = importance_of(config, visual)
    exact = importance_of(PruningConfig("zoo-exact", keep_tokens=9), visual)
    assert seen == ["bf16", "bf16", "auto"]
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
