"""Methods that select by what the vision tower attends to."""

from __future__ import annotations

import encoder_vectors as vectors
import pruning_checks as checks
import pytest
import torch

from llava.pruning import PruningConfig, PruningError, prune_visual_tokens, select


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_the_vector_is_the_reference_one() -> None:
    first = [0.9, 1.19552, 1.832039, 1.32738, -0.096165, 1.838, -0.080936, 1.745747]
    last = [0.272299, 0.041333, 0.220798, 1.031887, 1.861512, 0.33081, 0.95117, 0.651978]
    want = torch.tensor([first, last], dtype=torch.float64)
    torch.testing.assert_close(vectors.X[[0, -1]], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fastervlm_vector(dtype: torch.dtype) -> None:
    got = vectors.picks(vectors.visual(dtype), "fastervlm", 9)
    assert got == words("1 18 24 35 7 12 30 29 13")


def fopru_inputs():
    """A full attention matrix of one head over 1 + 36 tokens, and what the tower would report."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(37, 37, generator=generator, dtype=torch.float64).mul(3).softmax(dim=1)
    visual = vectors.visual(cls_attention=matrix[0, 1:], received_attention=matrix.mean(dim=0)[1:])
    return matrix, visual


def test_fopru_ranks_by_attention_received() -> None:
    matrix, visual = fopru_inputs()
    for options, scores in (
        ({}, matrix[1:, 1:].mean(dim=0)),
        ({"class_query": True}, matrix[:, 1:].mean(dim=0)),
        ({"significance": "class"}, matrix[0, 1:]),
    ):
        want = scores.argsort(descending=True)[:10].tolist()
        assert vectors.picks(visual, "fopru", 10, **options) == want


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
    visual = checks.make_visual(1, valid=valid)
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
    z = vectors.X
    extras = {"cls_attention": [vectors.attention()]}
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
