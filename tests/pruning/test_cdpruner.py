"""CDPruner: outputs of the official code, an independent reference, and the guards it lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pruning_checks as checks
import pytest
import sheet_vectors as sheet
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.pruning import PruningConfig, PruningError, VisualTokens, prune_visual_tokens, select
from llava.pruning.selection.dpp import dpp

GOLDENS = Path(__file__).parents[1] / "goldens" / "pruners" / "cdpruner"
CASES = sorted(path.name for path in GOLDENS.iterdir())
RUNS = [
    (name, run["keep"])
    for name in CASES
    for run in json.loads((GOLDENS / name / "case.json").read_text())["runs"]
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def golden_visual(name: str, dtype: torch.dtype) -> tuple[VisualTokens, dict[str, Tensor]]:
    """The tiles of one image, as the official code batches them."""
    inputs = load_file(GOLDENS / name / "inputs.safetensors")
    x = inputs["image_features"].to(dtype)
    side = round(x.shape[1] ** 0.5)
    extras = {
        "clip_image": list(inputs["image_embeds"].to(dtype)),
        "clip_text": [inputs["text_embeds"].to(dtype)],
    }
    index = torch.zeros(len(x), dtype=torch.long)
    visual = VisualTokens(x, x[..., :7].clone(), nn.Identity(), index, (side, side), None, extras)
    return visual, load_file(GOLDENS / name / "outputs.safetensors")


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_relevance_equals_the_official_one(name, dtype, record_error) -> None:
    visual, outputs = golden_visual(name, dtype)
    r = sheet.method("cdpruner", relevance="clip").score(visual)
    for key, got in (("relevance", r), ("kernel_diag", r.square())):
        error = float((got - outputs[key]).abs().max())
        record_error(f"cdpruner {key} ({dtype})", error)
        assert error < 1e-5


@DTYPES
@pytest.mark.parametrize(("name", "keep"), RUNS)
def test_picks_equal_the_official_ones(name, keep, dtype) -> None:
    visual, outputs = golden_visual(name, dtype)
    method = sheet.method("cdpruner", relevance="clip")
    counts = torch.full((len(visual.features),), keep)
    got = method.select(method.rows(visual, method.score(visual), counts))
    want = outputs[f"picked_in_order_keep{keep}"]
    # The order of the official float32 run, also where float64 sees margins below 1e-5.
    assert torch.equal(got.indices, want)
    gains = outputs["pick_relative_margin"][:, : keep - 1] * outputs["pick_gain"][:, : keep - 1]
    torch.testing.assert_close(got.margins[:, : keep - 1].float(), gains, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "keep"), RUNS)
def test_stage_equals_the_official_mask(name, keep) -> None:
    visual, outputs = golden_visual(name, torch.float32)
    config = PruningConfig.of("cdpruner", keep_tokens=keep * len(visual.features), relevance="clip")
    mask = torch.zeros(visual.features.shape[:2]).scatter(
        1, prune_visual_tokens(visual, config).kept, 1
    )
    assert torch.equal(mask.bool(), outputs[f"index_mask_keep{keep}"].bool())


def sheet_visual(dtype: torch.dtype) -> VisualTokens:
    # Cosines that are given: one image axis, tokens at those angles to the text.
    cosine = sheet.TEXT_COSINE
    image = torch.stack([cosine, (1 - cosine.square()).clamp_min(0).sqrt()], dim=1).to(dtype)
    text = torch.tensor([[1.0, 0.0]], dtype=dtype)
    return sheet.visual(dtype, clip_image=image, clip_text=text)


@DTYPES
@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("cdpruner", {"relevance": "clip"}, "31 10 3 24 11 18"),
        ("cdpruner", {"relevance": "clip", "relevance_sign": "positive"}, "0 14 35 28 21 29"),
        (
            "cen-prune",
            {"host": "cdpruner", "host_options": {"relevance": "clip"}},
            "25 23 26 24 9 4",
        ),
    ],
)
def test_picks_equal_the_reference(name, options, want, dtype) -> None:
    got = sheet.picks(sheet_visual(dtype), name, 6, **options)
    assert got == sheet.row(want)


def determinants(z: Tensor, quality: Tensor, k: int) -> list[int]:
    """Greedy MAP from determinants themselves."""
    unit = z / z.norm(dim=1, keepdim=True)
    kernel = quality[:, None] * (unit @ unit.T) * quality
    picked: list[int] = []
    while len(picked) < k:
        rest = [i for i in range(len(z)) if i not in picked]
        volumes = [torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]]) for i in rest]
        picked.append(rest[int(torch.stack(volumes).argmax())])
    return picked


@pytest.mark.parametrize("seed", range(5))
def test_dpp_is_the_greedy_determinant(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 20, 12, generator=generator, dtype=torch.float64)
    quality = torch.rand(2, 20, generator=generator, dtype=torch.float64) + 0.1
    valid = torch.rand(2, 20, generator=generator) > 0.2
    got = dpp(z, torch.tensor([8, 5]), quality=quality, valid=valid).indices
    assert got[1, 5:].tolist() == [-1] * 3
    for row, k in enumerate((8, 5)):
        own = valid[row].nonzero().flatten()
        want = own[determinants(z[row, own], quality[row, own], k)]
        assert got[row, :k].tolist() == want.tolist()


@DTYPES
def test_budget_above_the_rank(dtype) -> None:
    """The kernel has rank 8: after 8 picks the official code divides by noise."""
    method = sheet.method("cdpruner", relevance="clip")
    visual = sheet_visual(dtype)
    r = method.score(visual)[0]
    got = sheet.picks(visual, "cdpruner", 36, relevance="clip")
    assert sorted(got) == list(range(36))
    assert got[:6] == sheet.row("31 10 3 24 11 18")
    rest = [i for i in r.argsort(descending=True, stable=True).tolist() if i not in got[:8]]
    assert got[8:] == rest


def test_relevance_none_is_diversity_alone() -> None:
    visual = checks.make_visual(1)
    ones = torch.ones(1, checks.N)
    want = dpp(visual.features, 9, quality=ones).indices[0].sort().values
    config = PruningConfig.of("cdpruner", keep_tokens=9, relevance="none")
    assert torch.equal(prune_visual_tokens(visual, config).kept[0], want)
    assert config.pruner.needs == ("features",)
    projected = PruningConfig.of("cdpruner", keep_tokens=9, relevance="none", tokens="projected")
    want = dpp(visual.projected, 9).indices[0].sort().values
    assert torch.equal(prune_visual_tokens(visual, projected).kept[0], want)
    assert projected.pruner.needs == ()


def test_permutation_equivariance() -> None:
    """Up to the rank of the tokens, 10; beyond it equal tokens go by index."""
    generator = torch.Generator().manual_seed(3)
    visual = checks.make_visual(1, dtype=torch.float64, seed=5)
    image = torch.randn(checks.N, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    config = PruningConfig.of("cdpruner", keep_tokens=9, relevance="clip")
    visual.extras = {"clip_image": [image], "clip_text": [text]}
    out = prune_visual_tokens(visual, config)
    assert (out.trace.margins > 1e-9).all()
    order = torch.randperm(checks.N, generator=generator)
    moved = replace(
        visual,
        features=visual.features[:, order],
        projected=visual.projected[:, order],
        extras={"clip_image": [image[order]], "clip_text": [text]},
    )
    shuffled = prune_visual_tokens(moved, config)
    assert set(order[shuffled.kept[0]].tolist()) == set(out.kept[0].tolist())


def test_first_token_first_where_all_are_alike() -> None:
    for seed in range(5):
        visual = checks.make_visual(3, seed=seed)
        assert dpp(visual.features, 4).indices[:, 0].tolist() == [0, 0, 0]


def test_scope_and_theta() -> None:
    visual, _ = golden_visual("b2_n64_text2", torch.float64)
    r = sheet.method("cdpruner", relevance="clip").score(visual)
    tile = sheet.method("cdpruner", relevance="clip", minmax_scope="tile").score(visual)
    assert (tile.amax(dim=1) >= 1).all()
    assert (r.amax(dim=1) < 1).any()
    theta = sheet.method("cdpruner", relevance="clip", theta=0.5).score(visual)
    torch.testing.assert_close(theta, (0.5 * r).exp())


def test_equal_relevance_is_none() -> None:
    visual = checks.make_visual(1)
    visual.extras = {"clip_image": [torch.ones(checks.N, 3)], "clip_text": [torch.ones(1, 3)]}
    kept = [
        prune_visual_tokens(visual, PruningConfig.of("cdpruner", keep_tokens=9, relevance=r)).kept
        for r in ("none", "clip")
    ]
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relevance": "blip"}, "relevance must be one of auto, clip, none"),
        ({"relevance_sign": "minus"}, "negative, positive"),
        ({"minmax_scope": "batch"}, "image, tile"),
        ({"tokens": "pixels"}, "features, projected"),
        *(
            ({"theta": theta}, "theta must be a number of at least 0 and below 1 or None")
            for theta in (1, -0.1, "x", True)
        ),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(PruningError, match=message):
        PruningConfig("cdpruner", 9, options=options)


def test_missing_inputs_are_named() -> None:
    visual = checks.make_visual(1)
    with pytest.raises(PruningError, match="without 'clip_image'"):
        prune_visual_tokens(visual, PruningConfig.of("cdpruner", keep_tokens=9, relevance="clip"))
    with pytest.raises(PruningError, match="needs features"):
        select("cdpruner", projected=visual.projected[0], keep_tokens=9, relevance="none")
    bad = torch.full((1, checks.N), torch.nan)
    with pytest.raises(PruningError, match="NaN"):
        dpp(visual.features, 3, quality=bad)


@DTYPES
def test_without_the_guard_fewer_tokens_are_kept(dtype) -> None:
    """As released: beyond the rank, 8, the root of a negative number ends the choice."""
    visual = sheet_visual(dtype)
    options = {"relevance": "clip", "rank_guard": False}
    config = PruningConfig.of("cdpruner", keep_tokens=20, **options)
    guarded = sheet.picks(visual, "cdpruner", 20, relevance="clip")
    picks = sheet.picks(visual, "cdpruner", 20, **options)
    assert picks[:8] == guarded[:8]
    distinct = set(picks)
    assert 8 <= len(distinct) < 20
    out = prune_visual_tokens(visual, config)
    assert out.sources[0].float().argmax(dim=1).tolist() == sorted(distinct)
    assert torch.equal(out.embeddings(0), visual.projected[0][sorted(distinct)])
    assert not config.pruner.fixed_count
    # Below the rank the guard has nothing to do.
    for guard in (True, False):
        got = sheet.picks(visual, "cdpruner", 6, relevance="clip", rank_guard=guard)
        assert got == sheet.row("31 10 3 24 11 18")


def test_the_guard_takes_over_in_the_middle() -> None:
    """Rank 6 of 12 dimensions, several rows: volume first, then quality, nothing twice."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(3, 30, 6, generator=generator) @ torch.randn(6, 12, generator=generator)
    quality = torch.rand(3, 30, generator=generator) + 0.1
    got = dpp(z, 15, quality=quality)
    assert got.margins.isfinite().all() and (got.margins >= 0).all()
    for row in range(3):
        picks = got.indices[row].tolist()
        assert picks[:6] == determinants(z[row].double(), quality[row].double(), 6)
        rest = [i for i in quality[row].argsort(descending=True).tolist() if i not in picks[:6]]
        assert picks[6:] == rest[:9]


def test_cen_prune_needs_the_guard() -> None:
    with pytest.raises(PruningError, match="set of tokens"):
        options = {"rank_guard": False}
        PruningConfig.of("cen-prune", keep_tokens=5, host="cdpruner", host_options=options)
