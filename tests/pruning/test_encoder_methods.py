"""Methods that select by what the vision tower attends to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sheet_vectors as sheet
import torch
from pruning_inputs import read_visual

from llava.pruning import PruningConfig, PruningError, prune_visual_tokens, select
from llava.pruning.methods.agilepruner import effective_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fastervlm_vector(dtype: torch.dtype) -> None:
    got = sheet.picks(sheet.visual(dtype), "fastervlm", 9)
    assert got == sorted(sheet.row("1 18 24 35 7 12 30 29 13"))


def fopru_inputs():
    """A full attention matrix of one head over 1 + 36 tokens, and what the tower would report."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(37, 37, generator=generator, dtype=torch.float64).mul(3).softmax(dim=1)
    visual = sheet.visual(cls_attention=matrix[0, 1:], received_attention=matrix.mean(dim=0)[1:])
    return matrix, visual


def test_fopru_ranks_by_attention_received() -> None:
    matrix, visual = fopru_inputs()
    both = ("cls_attention", "received_attention")
    for options, needs, scores in (
        ({}, both, matrix[1:, 1:].mean(dim=0)),
        ({"class_query": True}, both[1:], matrix[:, 1:].mean(dim=0)),
        ({"significance": "class"}, both[:1], matrix[0, 1:]),
    ):
        want = sorted(scores.argsort(descending=True)[:10].tolist())
        assert sheet.method("fopru", **options).needs == needs
        # Nothing else is collected, so nothing else may be read.
        given = replace(visual, extras={need: visual.extras[need] for need in needs})
        assert sheet.picks(given, "fopru", 10, **options) == want


def test_fopru_keeps_whole_rows() -> None:
    matrix, visual = fopru_inputs()
    scores = matrix[1:, 1:].mean(dim=0).view(6, 6)
    rows = scores.mean(dim=1).argsort(descending=True).tolist()
    config = PruningConfig.of("fopru", keep_tokens=12, strategy="row")
    kept = prune_visual_tokens(visual, config).kept[0].tolist()
    assert kept == [row * 6 + col for row in sorted(rows[:2]) for col in range(6)]
    # 15 = two rows and the three best of the third.
    config = PruningConfig.of("fopru", keep_tokens=15, strategy="row")
    more = set(prune_visual_tokens(visual, config).kept[0].tolist()) - set(kept)
    assert more == {rows[2] * 6 + col for col in scores[rows[2]].topk(3).indices.tolist()}


def test_fopru_rows_skip_padding() -> None:
    valid = torch.ones(1, 36, dtype=torch.bool)
    valid[0, :9] = False
    visual = read_visual(1, valid=valid)
    scores = torch.zeros(36)
    scores[:12] = 5.0  # the best row is half padding
    visual.extras["received_attention"] = [scores]
    visual.extras["cls_attention"] = [scores]
    config = PruningConfig.of("fopru", keep_tokens=3, strategy="row")
    assert prune_visual_tokens(visual, config).kept[0].tolist() == [9, 10, 11]


def test_methods_that_go_by_rows_cannot_choose_among_joined_tiles() -> None:
    with pytest.raises(PruningError, match="rows and columns"):
        PruningConfig.of("fopru", keep_tokens=3, strategy="row", allocation="global")
    PruningConfig.of("fopru", keep_tokens=3, allocation="global")


def test_select_takes_readings() -> None:
    z = sheet.TOKENS
    extras = {"cls_attention": [sheet.ATTENTION]}
    kept = select("fastervlm", projected=z, keep_tokens=3, extras=extras)
    assert kept.tolist() == [1, 18, 24]
    with pytest.raises(PruningError, match="cls_attention"):
        select("fastervlm", projected=z, keep_tokens=3)


@pytest.mark.parametrize("word", ["strategy", "significance"])
def test_fopru_options_are_checked(word: str) -> None:
    with pytest.raises(PruningError, match=f"{word} must be one of"):
        PruningConfig.of("fopru", keep_tokens=3, **{word: "column"})
    with pytest.raises(PruningError, match="class_query must be true or false"):
        PruningConfig.of("fopru", keep_tokens=3, class_query="yes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("alpha", "want"), [(1.0, "1 18 7 13 30 24 29 23 8"), (0.5, "1 18 7 13 6 23 30 29 8")]
)
def test_scope_vector(alpha: float, want: str, dtype: torch.dtype) -> None:
    assert sheet.picks(sheet.visual(dtype), "scope", 9, alpha=alpha) == sheet.row(want)


def scope_by_hand(x: np.ndarray, a: np.ndarray, count: int, combine: str) -> list[int]:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    picked: list[int] = []
    while len(picked) < count:
        scores = []
        for v in range(len(x)):
            gain = 0.0
            for u in range(len(x)):
                covered = max([0.0, *(unit[u] @ unit[p] for p in picked)])
                gain += max(0.0, unit[u] @ unit[v] - covered)
            score = gain * a[v] if combine == "multiply" else gain + a[v]
            scores.append(-np.inf if v in picked else score)
        picked.append(int(np.argmax(scores)))
    return picked


@pytest.mark.parametrize("combine", ["multiply", "sum"])
def test_scope_is_the_formula(combine: str) -> None:
    # Attention of the size of a gain, so that a sum depends on it too.
    a = sheet.ATTENTION * 20
    visual = sheet.visual(cls_attention=a)
    want = scope_by_hand(sheet.TOKENS.numpy(), a.numpy(), 7, combine)
    assert sheet.picks(visual, "scope", 7, combine=combine) == want


def test_scope_in_half_precision_follows_rounded_gains() -> None:
    visual = read_visual(1, dtype=torch.float16, grid=(24, 24))
    # Near-equal tokens: the first gains are sums of 576 similarities near 1, 0.5 apart in float16.
    visual.features = visual.features * 0.05 + 1
    visual.extras["cls_attention"] = [torch.ones(576)]
    wide = sheet.picks(visual, "scope", 64)
    model = sheet.picks(visual, "scope", 64, precision="model")
    assert wide != model
    assert len(set(model)) == 64
    # Features that hold half precision numbers are the same whatever they are stored in.
    visual.features = visual.features.float()
    assert sheet.picks(visual, "scope", 64, precision="model") == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "want"), [(8, "1 18 24 35 9 23 31 21"), (9, "1 18 24 35 26 9 23 31 21")]
)
def test_vispruner_vector(count: int, want: str, dtype: torch.dtype) -> None:
    assert sheet.picks(sheet.visual(dtype), "vispruner", count) == sheet.row(want)


def vispruner_by_hand(x: np.ndarray, a: np.ndarray, count: int, ratio: float) -> set[int]:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    order = np.argsort(-a, kind="stable").tolist()
    important = int(count * ratio)
    residual = order[important:]
    while len(residual) > count - important:
        drop = min(8, len(residual) - (count - important))
        a_half, b_half = residual[0::2], residual[1::2]
        like = {i: max(unit[i] @ unit[j] for j in b_half) for i in a_half}
        residual = sorted(a_half, key=lambda i: -like[i])[drop:] + b_half
    return {*order[:important], *residual}


@pytest.mark.parametrize(("count", "ratio"), [(58, 0.5), (64, 0.75), (128, 0.5), (64, 0.0)])
def test_vispruner_is_the_rounds(count: int, ratio: float) -> None:
    """58 leaves 547 tokens: an odd number, at which the released code stops."""
    visual = read_visual(1, dtype=torch.float64, grid=(24, 24))
    config = PruningConfig.of("vispruner", keep_tokens=count, important_ratio=ratio)
    kept = prune_visual_tokens(visual, config).kept[0].tolist()
    x, a = visual.features[0].numpy(), visual.extras["cls_attention"][0].numpy()
    assert set(kept) == vispruner_by_hand(x, a, count, ratio)


def test_vispruner_of_ratio_one_is_fastervlm() -> None:
    visual = read_visual(2)
    kept = [
        prune_visual_tokens(visual, config).kept
        for config in (
            PruningConfig.of("vispruner", keep_tokens=9, important_ratio=1),
            PruningConfig("fastervlm", keep_tokens=9),
        )
    ]
    assert torch.equal(*kept)


def hiprune_by_hand(obj: np.ndarray, deep: np.ndarray, count: int, side: int, wrap: bool):
    n = round(count * 0.1 / 5)
    taken = set(np.argsort(-obj, kind="stable")[:n].tolist())
    for anchor in list(taken):
        for step in (-1, 1, -side, side):
            place = anchor + step
            if wrap:
                taken.add(min(max(place, 0), side * side - 1))
            elif 0 <= place < side * side and (abs(step) > 1 or place // side == anchor // side):
                taken.add(place)
    deep = deep.copy()
    deep[list(taken)] -= 1
    return taken | set(np.argsort(-deep, kind="stable")[: count - len(taken)].tolist())


@pytest.mark.parametrize(("count", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (20, 0)])
@pytest.mark.parametrize("wrap", [False, True])
def test_hiprune_is_anchors_buffers_registers(count: int, anchors: int, wrap: bool) -> None:
    visual = read_visual(1, dtype=torch.float64, grid=(24, 24))
    obj, deep = (visual.extras[f"{layer}_attention"][0] for layer in ("object", "received"))
    obj /= obj.sum()
    deep /= deep.sum()
    # Best anchors at the ends of a row and in a corner.
    obj[47], obj[0], obj[575], obj[100] = 0.9, 0.8, 0.7, 0.6
    config = PruningConfig.of("hiprune", keep_tokens=count, wrap_neighbours=wrap)
    kept = set(prune_visual_tokens(visual, config).kept[0].tolist())
    assert kept == hiprune_by_hand(obj.numpy(), deep.numpy(), count, 24, wrap)
    assert {47, 0, 575, 100} & kept >= set([47, 0, 575, 100][:anchors])
    if anchors:
        assert (48 in kept) == wrap


def test_hiprune_wraps_as_released_by_default() -> None:
    visual = read_visual(1)
    default, wrapped, touching = (
        prune_visual_tokens(visual, PruningConfig.of("hiprune", keep_tokens=9, alpha=1, **options))
        for options in ({}, {"wrap_neighbours": True}, {"wrap_neighbours": False})
    )
    assert torch.equal(default.kept, wrapped.kept)
    assert not torch.equal(default.kept, touching.kept)


def test_hiprune_never_keeps_more_than_asked() -> None:
    visual = read_visual(1)
    config = PruningConfig.of("hiprune", keep_tokens=7, alpha=5)
    kept = prune_visual_tokens(visual, config).kept[0].tolist()
    anchors = visual.extras["object_attention"][0].topk(7).indices
    assert kept == sorted(anchors.tolist())
    with pytest.raises(PruningError, match="rows and columns"):
        PruningConfig.of("hiprune", keep_tokens=7, allocation="global")


def test_effective_rank_of_the_reference() -> None:
    assert effective_rank(sheet.TOKENS, centre=False) == pytest.approx(6.893518, abs=1e-6)
    assert effective_rank(sheet.TOKENS, centre=True) == pytest.approx(7.202784, abs=1e-6)
    assert effective_rank(sheet.TOKENS.T, centre=False) == pytest.approx(6.893518, abs=1e-6)


def agile_by_hand(x: np.ndarray, a: np.ndarray, count: int, centre: bool, tau_max: float):
    values = np.linalg.svd(x - x.mean(axis=0) * centre, compute_uv=False)
    p = values / values.sum()
    erank = np.exp(-(p * np.log(p)).sum())
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    order = np.argsort(-a, kind="stable").tolist()
    left, kept = set(order), []
    for o, i in enumerate(order, start=1):
        if i in left and len(kept) < count:
            kept.append(i)
            tau = min(tau_max, o * erank / 16 * 0.01)
            left -= {j for j in left if 1 - unit[i] @ unit[j] < tau}
    walked = len(kept)
    kept += [i for i in order if i not in kept]
    return kept[:count], walked


@pytest.mark.parametrize(
    ("count", "centre", "tau_max"),
    [(9, True, 0.95), (9, False, 0.95), (30, True, 0.95), (9, True, 0.1)],
)
def test_agilepruner_is_the_walk(count: int, centre: bool, tau_max: float) -> None:
    a = sheet.ATTENTION.numpy()
    want, walked = agile_by_hand(sheet.TOKENS.numpy(), a, count, centre, tau_max)
    assert sheet.picks(sheet.visual(), "agilepruner", count, centre=centre, tau_max=tau_max) == want
    # At 30 of 36 the walk runs out and attention fills up.
    assert (walked < count) == (count == 30)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("vispruner", "important_ratio", 1.5),
        ("hiprune", "alpha", -1),
        ("hiprune", "wrap_neighbours", 2),
        ("scope", "alpha", "high"),
        ("scope", "combine", "add"),
        ("scope", "precision", "float16"),
        ("agilepruner", "erank_avg", 0),
        ("agilepruner", "tau_max", 3),
        ("prumerge", "neighbours", -1),
        ("prumerge", "adaptive", 1),
        ("prumerge", "emit_order", "random"),
        ("visionzip", "contextual", 1.5),
    ],
)
def test_wrong_options_are_named(name: str, option: str, value: object) -> None:
    with pytest.raises(PruningError, match=option):
        PruningConfig.of(name, keep_tokens=3, **{option: value})


ENCODER_METHODS = [
    *("agilepruner", "fastervlm", "fopru", "hiprune", "prumerge", "prumerge-plus"),
    *("scope", "visionzip", "vispruner"),
]


@pytest.mark.parametrize("name", ENCODER_METHODS)
@pytest.mark.parametrize("budget", [64, 128, 192, 160, 320, 640])
def test_published_budgets(name: str, budget: int) -> None:
    """64 of one tile of 576, 160 of five: what tables report, every tile an equal share."""
    tiles = 5 if budget in (160, 320, 640) else 1
    visual = read_visual(tiles, owners=[0] * tiles, grid=(24, 24))
    out = prune_visual_tokens(visual, PruningConfig(name, keep_tokens=budget))
    assert out.embeddings(0).shape[0] == budget
    assert out.valid.sum(dim=1).tolist() == [budget // tiles] * tiles
