"""Each promise check fails when the line it guards is broken: planted mutations."""

from __future__ import annotations

from dataclasses import replace

import pruning_checks as checks
import pytest
import torch

from llava.model import layouts
from llava.pruning import PruningError, method, stage
from llava.pruning.allocation import newlines, strategy
from llava.pruning.importance import sensitivity as sensitivity_module
from llava.pruning.layout import NEWLINE
from llava.pruning.methods import random
from llava.pruning.selection import max_min


def every_token(z, valid, row):
    return torch.arange(z.shape[1])


def highest_argmax(score):
    return score.shape[-1] - 1 - score.flip(-1).argmax(dim=-1)


def shifted(indices, padded=True):
    ordered = indices.sort(dim=1).values
    return torch.where(ordered > 0, ordered - 1, ordered)


def global_bank(seed, width, count):
    return torch.randn(count, width)


def unsorted(indices, padded=True):
    return indices


row_cosine = max_min.cosine


def unsteady_cosine(z):
    """A product that depends on more than the row's own tokens, exaggerated."""
    return row_cosine(z) + 0.2 * torch.rand(len(z), len(z))


MUTATIONS = {
    "sort dropped": (method, "raster_order", unsorted),
    "valid mask skipped": (max_min, "selectable", every_token),
    "duplicate re-picked": (max_min, "exclude", lambda limits: None),
    "tie to highest index": (max_min, "first_argmax", highest_argmax),
    "position off by one": (method, "raster_order", shifted),
    "global random state": (sensitivity_module, "direction_bank", global_bank),
    "batch-dependent product": (max_min, "cosine", unsteady_cosine),
}


def check_kept_is_brute_force() -> None:
    """What the stage keeps is the brute-force choice, sorted."""
    visual = checks.make_visual(1)
    out = stage.prune_visual_tokens(visual, checks.PruningConfig("divprune", keep_tokens=9))
    want = checks.brute_force(visual.projected[0], 9, None, None, "isolated")
    assert out.kept[0].tolist() == sorted(want)


CASES = [
    ("sort dropped", lambda: checks.check_count_and_order("zoo")),
    ("sort dropped", lambda: checks.check_count_and_order("divprune")),
    ("valid mask skipped", lambda: checks.check_valid_respected("zoo")),
    ("valid mask skipped", lambda: checks.check_valid_respected("divprune")),
    ("valid mask skipped", checks.check_brute_force),
    ("duplicate re-picked", lambda: checks.check_duplicates("divprune")),
    ("duplicate re-picked", lambda: checks.check_constant_features("zoo")),
    ("duplicate re-picked", checks.check_ties_to_lowest),
    ("tie to highest index", checks.check_ties_to_lowest),
    ("position off by one", check_kept_is_brute_force),
    ("global random state", lambda: checks.check_deterministic("zoo")),
    ("batch-dependent product", lambda: checks.check_batch_independence("divprune")),
]


@pytest.mark.parametrize(("mutation", "check"), CASES, ids=[case[0] for case in CASES])
def test_check_fails_under_mutation(mutation, check, monkeypatch) -> None:
    check()
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises((AssertionError, PruningError)):
        check()


def test_random_check_notices_the_global_generator(monkeypatch) -> None:
    monkeypatch.setattr(random.Random, "_row_seed", lambda *_: int(torch.randint(2**31, ())))
    with pytest.raises(AssertionError):
        checks.check_deterministic("random")


@pytest.mark.parametrize("broken", ["re-picked", "out of range", "too few", "padding"])
def test_a_method_that_breaks_its_contract_is_an_error(broken, monkeypatch) -> None:
    """The guard of the base class, for third-party methods."""
    valid = torch.ones(1, checks.N, dtype=torch.bool)
    valid[0, 7] = False
    indices = {
        "re-picked": [3, 3, 4],
        "out of range": [1, 2, checks.N],
        "too few": [1, 2, -1],
        "padding": [1, 2, 7],
    }[broken]
    picks = max_min.Picks(torch.tensor([indices]), torch.zeros(1, 3))
    cls = type(checks.PruningConfig("divprune", keep_tokens=3).pruner)
    monkeypatch.setattr(cls, "select", lambda *arguments: picks)
    with pytest.raises(PruningError, match="contract"):
        stage.prune_visual_tokens(
            checks.make_visual(1, valid=valid), checks.PruningConfig("divprune", keep_tokens=3)
        )


def test_direction_bank_uses_its_own_generator() -> None:
    sensitivity_module.direction_bank.cache_clear()
    checks.check_deterministic("zoo")


def no_newlines(layout, places):
    return [False] * layout.newline_rows[0]


raster_slots = strategy.raster_slots


def backwards(chosen):
    return raster_slots(chosen).flip(1)


def unmasked(layouts):
    return None


TILED_MUTATIONS = {
    "padding of crops not masked": (layouts, "padding_mask", unmasked),
    "rows of patches not counted": (newlines, "_used_rows", no_newlines),
    "order dropped": (strategy, "raster_slots", backwards),
}


def check_tiled_image() -> None:
    """Exact count in sequence order, no padding, and a newline for every row that has a patch."""
    layout = layouts.ImageLayout((6, 6), crops=(2, 2), window=(2, 0, 8, 12), newline=True)
    mask = layouts.padding_mask([layout])
    visual = replace(
        checks.make_visual(5, owners=[0] * 5, valid=mask),
        layouts=(layout,),
        newline=torch.ones(14),
    )
    config = checks.PruningConfig("divprune", keep_tokens=60, newline="keep")
    out = stage.prune_visual_tokens(visual, config)
    place = out.sequence(0).place
    assert len(place) == 60
    assert torch.equal(out.embeddings(0), visual.embeddings(0)[place])
    for row in out.kept.tolist():
        assert [i for i in row if i >= 0] == sorted(set(row) - {-1})
    assert (out.kept >= 0).sum() == (layout.sequence[place] != NEWLINE).sum()
    rows = torch.isin(layout.newline_grid(torch.arange(len(layout.sequence))), place)
    assert rows[rows[:, :-1].any(dim=1), -1].all()
    assert int(rows[:, -1].sum() - rows[:, :-1].any(dim=1).sum()) <= 1


@pytest.mark.parametrize("mutation", TILED_MUTATIONS)
def test_check_of_tiled_images_fails_under_mutation(mutation, monkeypatch) -> None:
    check_tiled_image()
    monkeypatch.setattr(*TILED_MUTATIONS[mutation])
    with pytest.raises((AssertionError, PruningError)):
        check_tiled_image()
