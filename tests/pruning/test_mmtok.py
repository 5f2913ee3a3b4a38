"""MMTok: an independent reference, brute force, batches, and what it asks for."""

from __future__ import annotations

import pruning_checks as checks
import pytest
import sheet_vectors as sheet
import torch
from torch import Tensor

from llava.pruning import PruningConfig, PruningError, prune_visual_tokens, select
from llava.pruning.selection.coverage import cover


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_picks_equal_the_reference(dtype) -> None:
    visual = sheet.visual(dtype, question_embeddings=sheet.TEXT)
    assert sheet.picks(visual, "mmtok", 9) == sheet.row("23 22 12 25 8 15 27 28 29")


def covered(similarity: Tensor, chosen: list[int]) -> float:
    return float(similarity[:, chosen].amax(dim=1).sum())


def test_coverage_is_greedy() -> None:
    generator = torch.Generator().manual_seed(2)
    similarity = torch.rand(17, 12, generator=generator, dtype=torch.float64)
    picked: list[int] = []
    while len(picked) < 6:
        rest = [j for j in range(12) if j not in picked]
        picked.append(max(rest, key=lambda j: covered(similarity, [*picked, j])))
    assert cover(similarity, 6).indices.tolist() == picked
    assert sorted(cover(similarity, 12).indices.tolist()) == list(range(12))
    with pytest.raises(PruningError, match="13 of 12"):
        cover(similarity, 13)
    with pytest.raises(PruningError, match="NaN"):
        cover(similarity * torch.nan, 2)


def test_question_moves_the_choice() -> None:
    visual = checks.make_visual(1)
    aimed = torch.stack([visual.projected[0, 17], visual.projected[0, 3]])
    visual.extras = {"question_embeddings": [aimed]}
    kept = prune_visual_tokens(visual, PruningConfig("mmtok", 4)).kept[0].tolist()
    assert {3, 17} <= set(kept)
    blind = PruningConfig.of("mmtok", keep_tokens=4, text="none")
    assert blind.pruner.needs == ("features",)
    assert prune_visual_tokens(visual, blind).kept[0].tolist() != kept
    # A question without words is nothing to cover.
    visual.extras = {"question_embeddings": [aimed[:0]]}
    empty = prune_visual_tokens(visual, PruningConfig("mmtok", 4))
    assert torch.equal(empty.kept, prune_visual_tokens(visual, blind).kept)


@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_every_image_has_its_own_question(allocation) -> None:
    visual = checks.make_visual(3, owners=[0, 0, 1])
    questions = [visual.projected[0, :2], visual.projected[2, 5:9]]
    visual.extras = {"question_embeddings": questions}
    config = PruningConfig("mmtok", 10, allocation=allocation)
    out = prune_visual_tokens(visual, config)
    swapped = visual.take_images([1, 0])
    assert torch.equal(swapped.extras["question_embeddings"][0], questions[1])
    other = prune_visual_tokens(swapped, config)
    for image in range(2):
        assert len(out.embeddings(image)) == 10
        assert torch.equal(out.embeddings(image), other.embeddings(1 - image))


def test_refused() -> None:
    visual = checks.make_visual(1)
    visual.extras = {}
    with pytest.raises(PruningError, match="without 'question_embeddings'"):
        prune_visual_tokens(visual, PruningConfig("mmtok", 4))
    with pytest.raises(PruningError, match="needs features"):
        select("mmtok", projected=visual.projected[0], keep_tokens=4)
    for name in ("tau_t", "tau_v", "alpha"):
        with pytest.raises(PruningError, match=f"{name} must be a positive number"):
            PruningConfig("mmtok", 4, options={name: 0})
    with pytest.raises(PruningError, match="text must be one of question, none"):
        PruningConfig.of("mmtok", keep_tokens=4, text="caption")
