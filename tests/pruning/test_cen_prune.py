"""Cen-Prune: published formulas, every host, and what cannot be wrapped."""

from __future__ import annotations

import numpy as np
import pruning_checks as checks
import pytest
import sheet_vectors as sheet
import torch

from llava.pruning import PruningConfig, PruningError, parse_options, prune_visual_tokens
from llava.pruning.importance.normalise import centre
from llava.pruning.importance.similarity import distinctiveness

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def test_inputs() -> None:
    sheet.check_inputs()


@DTYPES
def test_parts_equal_the_reference(dtype) -> None:
    x = sheet.visual(dtype).projected
    g = distinctiveness(x)[0]
    assert float(-g.mean()) == pytest.approx(0.144589, abs=1e-6)
    assert (int(g.argmin()), int(g.argmax())) == (1, 25)
    z = centre(x)[0]
    assert float(torch.cosine_similarity(z[0], z[1], dim=0)) == pytest.approx(0.297699, abs=1e-6)


@DTYPES
@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("divprune", {}, "31 25 5 9 12 8 24 10 16"),
        ("cen-prune", {"host": "divprune"}, "31 25 9 23 8 12 24 11 10"),
    ],
)
def test_picks_equal_the_reference(name, options, want, dtype) -> None:
    got = sheet.picks(sheet.visual(dtype), name, 9, **options)
    assert got == sheet.row(want)


def brute_force(visual, k: int, importance: torch.Tensor | None, combine) -> list[int]:
    """One row as the paper writes it: no running state, every cosine by itself."""
    z = visual.projected[0].double()
    n = len(z)

    def cosine(a, b) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    g = torch.tensor([-sum(cosine(z[i], z[j]) for j in range(n) if j != i) for i in range(n)])
    g = (g - g.min()) / (g.max() - g.min())
    moved = z - z.mean(dim=0)
    distance = [[1 - cosine(moved[i], moved[j]) for j in range(n)] for i in range(n)]
    picked: list[int] = []
    while len(picked) < k:
        if importance is None:
            first = [min(distance[i][j] for j in range(n) if j != i) for i in range(n)]
            weights = g
        else:
            low, high = importance.min(), importance.max()
            first = weights = g * (importance - low) / (high - low)
        scores = [
            float(combine(weights[i], min(distance[i][j] for j in picked)) if picked else first[i])
            if i not in picked
            else -1.0
            for i in range(n)
        ]
        picked.append(max(range(n), key=scores.__getitem__))
    return picked


@pytest.mark.parametrize("host", ["divprune", "norm", "zoo", "zoo-exact"])
@pytest.mark.parametrize("combine", ["multiply", "sum"])
def test_equals_brute_force(host, combine) -> None:
    if combine == "sum" and not host.startswith("zoo"):
        pytest.skip("only zoo and zoo-exact can add")
    options = {"fusion": combine} if combine == "sum" else {}
    visual = checks.make_visual(1, dtype=torch.float64, seed=2)
    method = sheet.method("cen-prune", host=host, host_options=options)
    importance = method.score(visual)
    rule = torch.add if combine == "sum" else torch.mul
    own = None if importance is None else importance[0]
    want = brute_force(visual, 12, own, lambda weight, far: rule(weight, torch.tensor(far)))
    got = sheet.picks(visual, "cen-prune", 12, host=host, host_options=options)
    if host == "divprune":
        # Two mutually nearest tokens may tie for the first pick; the rest does not hang on rounding
        assert set(got) == set(want)
    else:
        assert got == want
    assert got != sheet.picks(visual, host, 12, **options)


def test_host_options_reach_the_host() -> None:
    visual = checks.make_visual(1)
    options = parse_options(["host=zoo", 'host_options={"fusion": "diversity", "directions": 3}'])
    config = PruningConfig("cen-prune", 9, options=options)
    assert PruningConfig.from_dict(config.to_dict()) == config
    diverse = prune_visual_tokens(visual, config)
    plain = prune_visual_tokens(visual, PruningConfig("cen-prune", 9))
    assert torch.equal(diverse.kept, plain.kept)
    assert config.pruner.needs == ("features", "projector")
    assert PruningConfig("cen-prune", 9).pruner.needs == ()


@pytest.mark.parametrize("host", ["zoo-exact", "norm"])
@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_tiles(host, allocation) -> None:
    visual = checks.make_visual(3, owners=[0, 0, 1])
    config = PruningConfig("cen-prune", 11, options={"host": host}, allocation=allocation)
    out = prune_visual_tokens(visual, config)
    assert [len(out.embeddings(image)) for image in range(2)] == [11, 11]
    alone = prune_visual_tokens(visual.take_images([1]), config)
    assert torch.equal(out.embeddings(1), alone.embeddings(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "grid"}, "cannot wrap 'grid', which does not select by how similar tokens are"),
        ({"host": "pool"}, "host can be cdpruner, divprune, norm, zoo, zoo-exact"),
        ({"host": "cen-prune"}, "cannot wrap 'cen-prune'"),
        ({"host": "divprun"}, "did you mean 'divprune'"),
        ({"host": "zoo", "host_options": {"fusion": "sensitivity"}}, "nothing is left to centre"),
        ({"host": "zoo", "host_options": {"step": 0}}, "step must be a positive number"),
        ({"host": "zoo", "host_options": {"stp": 1}}, "did you mean 'step'"),
        ({"host": "zoo", "host_options": 3}, "must be a mapping"),
        ({"fusion": "sum"}, "unknown option of 'cen-prune': 'fusion'"),
    ],
)
def test_what_cannot_be_wrapped(options, message) -> None:
    with pytest.raises(PruningError, match=message):
        PruningConfig("cen-prune", 9, options=options)


def test_qwen_form_scales_channels_and_weighs_by_a_sigmoid() -> None:
    """One channel that carries nearly all variance decides the plain form, not this one."""
    visual = checks.make_visual(2, dtype=torch.float64, seed=6)
    visual.features[..., 0] *= 1000
    config = PruningConfig.of("cen-prune", keep_tokens=8, form="qwen")
    got = prune_visual_tokens(visual, config)
    assert config.pruner.needs == ("features",)
    for tile in range(2):
        x = visual.features[tile].numpy()
        x = x / np.sqrt(x.var(axis=0) + 1e-6)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        g = -((unit @ unit.T).sum(axis=1) - 1) / (len(x) - 1)
        weight = 1 / (1 + np.exp(-(g - g.mean()) / g.std()))
        x = x - x.mean(axis=0)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosine = unit @ unit.T
        distance = 1 - cosine
        np.fill_diagonal(distance, 9)
        picks = [int(distance.min(axis=0).argmax())]
        while len(picks) < 8:
            score = weight * distance[picks].min(axis=0)
            score[picks] = -1
            picks.append(int(score.argmax()))
        assert got.kept[tile].tolist() == sorted(picks)
    plain = prune_visual_tokens(visual, PruningConfig("cen-prune", 8))
    assert not torch.equal(plain.kept, got.kept)


def test_qwen_form_with_padding_and_equal_tokens() -> None:
    valid = torch.ones(1, checks.N, dtype=torch.bool)
    valid[0, 20:] = False
    visual = checks.make_visual(1, valid=valid)
    config = PruningConfig.of("cen-prune", keep_tokens=8, form="qwen")
    kept = prune_visual_tokens(visual, config).kept
    visual.features[0, 20:] = 1e6
    assert torch.equal(prune_visual_tokens(visual, config).kept, kept)
    visual.features[:] = 1.0
    assert prune_visual_tokens(visual, config).kept.tolist() == [list(range(8))]
    with pytest.raises(PruningError, match="form"):
        PruningConfig.of("cen-prune", keep_tokens=8, form="internvl")
