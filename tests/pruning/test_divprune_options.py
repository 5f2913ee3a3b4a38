"""DivPrune as its released code and its paper's figures have it, behind options."""

from __future__ import annotations

import pruning_checks as checks
import pytest
import sheet_vectors as sheet
import torch
from torch import Tensor

from llava.pruning import PruningConfig, PruningError, prune_visual_tokens


def emitted(visual, keep: int, **options) -> list[int]:
    """Source of every token that comes out, in that order."""
    config = PruningConfig.of("divprune", keep_tokens=keep, **options)
    out = prune_visual_tokens(visual, config)
    assert out.embeddings(0).shape[0] == keep
    if out.kept is not None:
        return out.kept[0].tolist()
    assert (out.sources[0].sum(dim=1) == 1).all()
    sources = out.sources[0].float().argmax(dim=1).tolist()
    assert torch.equal(out.embeddings(0), visual.projected[0][sources])
    return sources


def test_tokens_come_in_the_order_of_picks() -> None:
    want = sheet.row("31 25 5 9 12 8 24 10 16")
    assert emitted(sheet.visual(), 9, emit_order="selection") == want
    assert emitted(sheet.visual(), 9) == sorted(want)


def test_unmasked_picks_repeat_when_nothing_distinct_is_left() -> None:
    """36 rows, 5 of them distinct: 9 tokens come out all the same, some of them more than once."""
    visual = sheet.visual()
    visual.projected = visual.projected[:, torch.arange(36) % 5]
    sound = emitted(visual, 9, emit_order="selection")
    assert len(set(sound)) == 9 and {i % 5 for i in sound[:5]} == set(range(5))
    picks = emitted(visual, 9, emit_order="selection", mask_selected=False)
    assert {i % 5 for i in picks[:5]} == set(range(5))
    assert picks[:5] == sound[:5] and len(set(picks)) < 9
    assert emitted(visual, 9, mask_selected=False) == sorted(picks)


def test_unmasked_picks_are_the_same_where_all_differ() -> None:
    visual = checks.make_visual(1)
    assert emitted(visual, 12, mask_selected=False) == emitted(visual, 12)


def in_own_type(z: Tensor, k: int) -> list[int]:
    """The published rule on z [N, C], every operation in z's type."""
    unit = z / z.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    nearest = distance.clone().fill_diagonal_(2).amin(dim=0)
    picks = [int(nearest.argmax())]
    while len(picks) < k:
        score = distance[picks].amin(dim=0)
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
    return picks


def test_half_precision_makes_ties() -> None:
    """Tokens close to each other, so that half precision cannot tell many distances apart."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 1, 14, generator=generator)
    spread = torch.randn(1, 144, 14, generator=generator)
    visual = checks.make_visual(1, grid=(12, 12), dtype=torch.float16)
    visual.projected = (common + 0.1 * spread).half()
    half = emitted(visual, 24, precision="model", emit_order="selection")
    assert half == in_own_type(visual.projected[0], 24)
    exact = emitted(visual, 24, emit_order="selection")
    assert exact == in_own_type(visual.projected[0].float(), 24)
    assert half != exact


def test_gradients_reach_what_is_listed() -> None:
    visual = checks.make_visual(1)
    visual.projected.requires_grad_(True)
    config = PruningConfig.of("divprune", keep_tokens=5, emit_order="selection")
    out = prune_visual_tokens(visual, config)
    out.projected.sum().backward()
    assert torch.equal(visual.projected.grad[0].abs().sum(-1) > 0, out.sources[0].any(dim=0))


def test_padding_stays_out() -> None:
    valid = torch.ones(2, checks.N, dtype=torch.bool)
    valid[0, 20:] = False
    visual = checks.make_visual(2, valid=valid)
    for options in ({"emit_order": "selection"}, {"mask_selected": False}):
        out = prune_visual_tokens(visual, PruningConfig.of("divprune", keep_tokens=15, **options))
        assert not out.sources[0, :, 20:].any()
        assert [len(out.embeddings(i)) for i in range(2)] == [15, 15]


def test_a_list_of_tokens_has_no_places_of_its_own() -> None:
    with pytest.raises(PruningError, match="positions"):
        PruningConfig.of("divprune", keep_tokens=5, emit_order="selection", positions="original")
    with pytest.raises(PruningError, match="set of tokens"):
        options = {"mask_selected": False}
        PruningConfig.of("cen-prune", keep_tokens=5, host_options=options)
    for option in ({"precision": "half"}, {"mask_selected": 1}, {"emit_order": "random"}):
        with pytest.raises(PruningError, match=next(iter(option))):
            PruningConfig.of("divprune", keep_tokens=5, **option)
