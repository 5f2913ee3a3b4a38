"""One suite over every registered method."""

from __future__ import annotations

from pathlib import Path

import pruning_checks as checks
import pytest
import torch
from torch import nn

from llava.pruning import (
    PruningConfig,
    PruningError,
    VisualTokens,
    get_method,
    importance_of,
    list_methods,
    max_min,
    prune_visual_tokens,
    select,
    sensitivity,
)
from llava.pruning.importance.projectors import untrained

GOLDENS = Path(__file__).parents[1] / "goldens"
METHODS = list_methods()
PRUNING = [name for name in METHODS if get_method(name).budgeted]
each_method = pytest.mark.parametrize("name", METHODS)
each_pruning = pytest.mark.parametrize("name", PRUNING)


@each_method
@pytest.mark.parametrize("check", checks.PROMISES, ids=lambda check: check.__name__)
def test_promises(name: str, check) -> None:
    check(name)


@each_pruning
def test_non_finite_tokens_are_refused(name: str) -> None:
    checks.check_non_finite_refused(name)


@each_pruning
def test_permutation_equivariance(name: str) -> None:
    checks.check_equivariance(name)


@each_method
def test_flags(name: str) -> None:
    cls = get_method(name)
    assert cls.fidelity in ("golden", "vectors", "reconstructed", "own")
    recorded = GOLDENS if name == "none" else GOLDENS / "pruners" / name
    assert cls.fidelity != "golden" or any(recorded.iterdir())
    assert cls.stage in ("pre_llm", "decoder")
    assert cls.__doc__
    assert cls.__dataclass_params__.frozen


@each_pruning
def test_gradients_reach_kept_tokens_only(name: str) -> None:
    visual = checks.visual_for(name)
    # Methods that merge before the projector reach the features instead.
    sides = [visual.features.requires_grad_(True), visual.projected.requires_grad_(True)]
    out = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9))
    out.projected.sum().backward()
    reached = [side.grad.abs().sum(dim=-1) > 0 for side in sides if side.grad is not None]
    touched = torch.stack(reached).any(dim=0)
    if out.kept is not None:
        want = torch.zeros_like(touched).scatter(1, out.kept, True)
    else:
        want = out.sources.any(dim=1)
    assert torch.equal(touched, want)


@each_pruning
def test_works_in_inference_mode(name: str) -> None:
    config = PruningConfig(name, keep_tokens=9)
    want = prune_visual_tokens(checks.visual_for(name), config)
    with torch.inference_mode():
        got = prune_visual_tokens(checks.visual_for(name), config)
    assert torch.equal(got.projected, want.projected)


@each_pruning
def test_select_equals_the_stage(name: str) -> None:
    visual = checks.make_visual(1)
    arguments = {
        "features": visual.features[0],
        "projected": visual.projected[0],
        "projector": visual.projector,
        "keep_tokens": 9,
        "grid": checks.GRID,
    }
    if get_method(name).merges:
        with pytest.raises(PruningError, match="no indices"):
            select(name, **arguments)
        return
    config = PruningConfig(name, keep_tokens=9)
    if not set(config.pruner.needs) <= {"features", "projector", "image_digest"}:
        with pytest.raises(PruningError):  # it needs what only a model collects
            select(name, **arguments)
        return
    out = prune_visual_tokens(visual, config)
    assert torch.equal(select(name, **arguments), out.kept[0])
    assert select(name, **{**arguments, "keep_tokens": 99}).tolist() == list(range(checks.N))


def test_select_names_what_is_missing() -> None:
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert len(select("divprune", projected=z, keep_tokens=3)) == 3
    with pytest.raises(PruningError, match="needs features"):
        select("zoo", projected=z, keep_tokens=3)
    with pytest.raises(PruningError, match="needs projector"):
        select("zoo-exact", projected=z, features=z, keep_tokens=3)


def kept_by(name: str, visual: VisualTokens, keep: int, **options) -> list[int]:
    config = PruningConfig.of(name, keep_tokens=keep, **options)
    return prune_visual_tokens(visual, config).kept[0].tolist()


def test_zoo_fusions() -> None:
    visual = checks.make_visual(1, dtype=torch.float64)
    s = sensitivity(visual.projector, visual.features)[0]
    weights = (s - s.min()) / (s.max() - s.min() + 1e-8)
    top = s.topk(8).indices.sort().values.tolist()
    assert kept_by("zoo", visual, 8, fusion="sensitivity") == top
    assert kept_by("zoo", visual, 8, fusion="diversity") == kept_by("divprune", visual, 8)
    z = visual.projected
    assert kept_by("zoo", visual, 8) == sorted(max_min(z, 8, weights=weights[None])[0].tolist())
    unit = z[0] / z[0].norm(dim=1, keepdim=True)
    picks = [int(weights.argmax())]
    while len(picks) < 8:
        score = weights + 1 - (unit @ unit[picks].T).amax(dim=1)
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
    assert kept_by("zoo", visual, 8, fusion="sum") == sorted(picks)


def test_linear_projector_leaves_pure_diversity() -> None:
    visual = checks.make_visual(1)
    visual.projector = nn.Linear(10, 14)
    want = sorted(max_min(visual.projected, 8)[0].tolist())
    for name in ("zoo", "zoo-exact"):
        assert kept_by(name, visual, 8) == want


def test_zoo_seed_and_directions_matter_and_repeat() -> None:
    visual = checks.make_visual(1)
    scores = [
        importance_of(PruningConfig.of("zoo", keep_tokens=8, seed=seed, directions=4), visual)
        for seed in (0, 1, 0)
    ]
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])


def test_least_sensitive_is_the_opposite_end() -> None:
    visual = checks.make_visual(1)
    s = importance_of(PruningConfig("zoo-exact", keep_tokens=1), visual)[0]
    assert kept_by("least-sensitive", visual, 5) == sorted(s.argsort()[:5].tolist())
    with pytest.raises(PruningError, match="does not score"):
        importance_of(PruningConfig("grid", keep_tokens=1), visual)


def test_random_depends_on_seed_content_and_place() -> None:
    visual = checks.make_visual(1)
    base = kept_by("random", visual, 9)
    assert base != kept_by("random", visual, 9, seed=1)
    assert base != kept_by("random", checks.make_visual(1, seed=4), 9)
    visual.extras["image_digest"] = [5]
    digest = kept_by("random", visual, 9)
    # With a digest of the pixels, rounding in the tower does not move the draw.
    visual.features = visual.features + 1e-6
    assert kept_by("random", visual, 9) == digest
    visual.extras["image_position"] = [1]
    assert kept_by("random", visual, 9) != digest
    pair = VisualTokens(
        visual.features.expand(2, -1, -1).clone(),
        visual.projected.expand(2, -1, -1).clone(),
        visual.projector,
        torch.zeros(2, dtype=torch.long),
        checks.GRID,
    )
    out = prune_visual_tokens(pair, PruningConfig("random", keep_tokens=18))
    assert out.kept[0].tolist() != out.kept[1].tolist()


def test_grid_takes_centres() -> None:
    visual = checks.make_visual(1, grid=(24, 24))
    kept = kept_by("grid", visual, 64)
    assert kept[:8] == [24 + 1 + 3 * i for i in range(8)]
    rows = {i // 24 for i in kept_by("grid", visual, 128)}
    assert len(rows) == 16
    # 127 is prime and larger than either side: every (n / k)-th token.
    assert kept_by("grid", visual, 127) == [int((i + 0.5) * 576 / 127) for i in range(127)]


def test_pool_averages() -> None:
    visual = checks.make_visual(1)
    out = prune_visual_tokens(visual, PruningConfig("pool", keep_tokens=9))
    corner = visual.projected[0].view(6, 6, -1)[:2, :2].reshape(4, -1).mean(dim=0)
    assert torch.allclose(out.embeddings(0)[0], corner, atol=1e-6)
    assert out.sources[0, 0].nonzero()[:, 0].tolist() == [0, 1, 6, 7]
    assert out.kept is None


def test_pool_names_neighbours() -> None:
    with pytest.raises(PruningError, match="30 and 36"):
        prune_visual_tokens(checks.make_visual(1), PruningConfig("pool", keep_tokens=31))


def test_projector_rank_is_the_truncated_svd() -> None:
    visual = checks.make_visual(1, dtype=torch.float64)
    first, act, second = visual.projector
    truncated = nn.Sequential(nn.Linear(10, 17), act, nn.Linear(17, 14)).double()
    for ours, layer in ((truncated[0], first), (truncated[2], second)):
        u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        s[3:] = 0
        ours.weight.data = u @ torch.diag(s) @ vh
        ours.bias.data = layer.bias.data
    for name in ("zoo", "zoo-exact"):
        config = PruningConfig.of(name, keep_tokens=5, projector_rank=3)
        want = sensitivity(
            truncated,
            visual.features,
            estimator="exact" if name == "zoo-exact" else "zeroth_order",
        )
        torch.testing.assert_close(importance_of(config, visual), want, rtol=1e-9, atol=0)
    full = PruningConfig.of("zoo-exact", keep_tokens=5, projector_rank=99)
    want = sensitivity(visual.projector, visual.features, estimator="exact")
    torch.testing.assert_close(importance_of(full, visual), want, rtol=1e-9, atol=0)


def test_untrained_projector_knows_nothing_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    projectors = [nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 96)) for _ in range(2)]
    features = torch.randn(1, 60, 48, generator=generator)

    def scores(projector: nn.Module, **options: object) -> torch.Tensor:
        config = PruningConfig.of("zoo", keep_tokens=5, projector_rank=16, **options)
        projected = projector(features).detach()
        visual = VisualTokens(features, projected, projector, torch.zeros(1, dtype=int), (6, 10))
        return importance_of(config, visual)[0]

    one, other = (scores(each, projector_weights="untrained") for each in projectors)
    assert torch.equal(one, other)
    assert not torch.equal(*(scores(each) for each in projectors))
    assert not torch.equal(one, scores(projectors[0], projector_weights="untrained", seed=1))
    made = untrained(projectors[0], 16, seed=0)
    assert [tuple(layer.weight.shape) for layer in (made[0], made[2])] == [(96, 48), (96, 96)]
    assert torch.linalg.matrix_rank(made[0].weight) == 16
    # entries are sums of 16 products of two N(0, 0.02)
    assert made[0].weight.std().item() == pytest.approx(0.02**2 * 4, rel=0.1)
    with pytest.raises(PruningError, match="Linear-activation-Linear"):
        untrained(nn.Linear(48, 96), 16, seed=0)
    for wrong in ({"projector_rank": None}, {"projector_weights": "random"}):
        options = {"projector_rank": 16, "projector_weights": "untrained"} | wrong
        with pytest.raises(PruningError, match="projector_weights"):
            PruningConfig.of("zoo", keep_tokens=5, **options)
