"""Every promise of the suite fails on a toy method that breaks it, and passes on a sound one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count

import pruning_checks as checks
import pytest
import torch
from pruning_inputs import MAKERS

from llava.pruning import PruningError, selector
from llava.pruning.method import PruningMethod
from llava.pruning.methods.hiprune import HiPrune

# The last one: a projector that was not asked for has no forward.
FAILURES = (AssertionError, PruningError, pytest.fail.Exception, NotImplementedError)


@dataclass(frozen=True)
class Toy(PruningMethod):
    """Keep the tokens with the highest sum of features: sound, the root of what is broken below."""

    name = "toy"
    needs = ("features",)

    def score(self, tokens):
        return tokens.features.double().sum(dim=-1)

    def select(self, rows):
        return rows.highest()


class KeepsOneFewer(Toy):
    def num_kept(self, n, budget):
        return min(n, budget) - 1


class KeepsAtLeastTwo(Toy):
    def num_kept(self, n, budget):
        return min(n, max(budget, 2))


class NeverKeepsAll(Toy):
    def num_kept(self, n, budget):
        return min(n - 1, budget)


class ComparesWithPadding(Toy):
    def score(self, tokens):
        score = super().score(tokens)
        return (score - score.mean(dim=1, keepdim=True)).abs()


class ComparesWithTheBatch(Toy):
    def score(self, tokens):
        score = super().score(tokens)
        return (score - score[:, :24].mean()).abs()


class DrawsGlobally(Toy):
    def score(self, tokens):
        return torch.rand(tokens.features.shape[:2])


class SeedsGlobally(Toy):
    def score(self, tokens):
        random.seed(0)
        return super().score(tokens)


class RemembersTheFirstCall(Toy):
    calls = count()

    def score(self, tokens):
        score = super().score(tokens)
        return score if next(self.calls) == 0 else -score


class ChangesWeights(Toy):
    def score(self, tokens):
        tokens.projector[0].bias.data.add_(1)
        return super().score(tokens)


class ChangesTrainingFlags(Toy):
    def score(self, tokens):
        tokens.projector.eval()
        return super().score(tokens)


class ChangesItsInput(Toy):
    def score(self, tokens):
        return tokens.features.exp_().sum(dim=-1)


class DeclaresNoNeeds(Toy):
    needs = ()


class CallsAnUndeclaredProjector(Toy):
    def score(self, tokens):
        return tokens.projector(tokens.features).sum(dim=-1)


class LooksAtPlaces(Toy):
    def score(self, tokens):
        return super().score(tokens) + torch.arange(tokens.features.shape[1])


class PicksDuplicatesAgain(Toy):
    def select(self, rows):
        picks = super().select(rows)
        first = (rows.scored[:, :, None] == rows.scored[:, None]).float().argmax(dim=-1)
        again = first.gather(1, picks.indices.clamp(min=0))
        return picks._replace(indices=again.masked_fill(picks.indices < 0, -1))


class DividesByTheSpread(Toy):
    def score(self, tokens):
        score = super().score(tokens)
        low, high = score.amin(dim=1, keepdim=True), score.amax(dim=1, keepdim=True)
        return (score - low) / (high - low)


class WorksInHalfPrecision(Toy):
    def score(self, tokens):
        return (tokens.features.sum(dim=-1) * 50) % 1


CASES = [
    (checks.check_count_and_order, KeepsOneFewer),
    (checks.check_smallest_and_largest_budgets, KeepsAtLeastTwo),
    (checks.check_budget_of_all_tokens, NeverKeepsAll),
    (checks.check_valid_respected, ComparesWithPadding),
    (checks.check_batch_independence, ComparesWithTheBatch),
    (checks.check_deterministic, DrawsGlobally),
    (checks.check_deterministic, SeedsGlobally),
    (checks.check_deterministic, RemembersTheFirstCall),
    (checks.check_model_untouched, ChangesWeights),
    (checks.check_model_untouched, ChangesTrainingFlags),
    (checks.check_model_untouched, ChangesItsInput),
    (checks.check_declared_needs, DeclaresNoNeeds),
    (checks.check_declared_needs, CallsAnUndeclaredProjector),
    (checks.check_permutation, LooksAtPlaces),
    (checks.check_duplicates, PicksDuplicatesAgain),
    (checks.check_constant_features, DividesByTheSpread),
    (checks.check_half_precision, WorksInHalfPrecision),
]


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
def test_a_sound_method_keeps_every_promise(check) -> None:
    with checks.registered(Toy) as name:
        check(name)


@pytest.mark.parametrize(("check", "broken"), CASES, ids=[case[1].__name__ for case in CASES])
def test_a_broken_method_is_caught(check, broken) -> None:
    with checks.registered(broken) as name, pytest.raises(FAILURES):
        check(name)


class SaysItLooksAtPlaces(Toy):
    equivariant = False


class HidesItsNeighbours(HiPrune):
    name = "hides"
    equivariant = True


@pytest.mark.parametrize("liar", [SaysItLooksAtPlaces, HidesItsNeighbours, LooksAtPlaces])
def test_a_wrong_word_about_places_is_caught(liar) -> None:
    with checks.registered(liar) as name, pytest.raises(FAILURES):
        checks.check_equivariance(name)


def test_a_stage_that_lets_nan_pass_is_caught(monkeypatch) -> None:
    monkeypatch.setattr(selector, "refuse_non_finite", lambda visual: None)
    with checks.registered(Toy) as name, pytest.raises(FAILURES):
        checks.check_non_finite_refused(name)


def test_every_promise_is_shown_to_fail() -> None:
    shown = {check for check, _ in CASES} | {checks.check_non_finite_refused}
    assert shown == set(checks.ALL)


def test_an_unknown_need_is_named() -> None:
    class NeedsMore(Toy):
        needs = ("depth_map",)

    with checks.registered(NeedsMore) as name, pytest.raises(LookupError, match="'depth_map'"):
        checks.check_count_and_order(name)


def test_every_need_can_be_supplied() -> None:
    """No entry of the table of makers is broken, also those that only a plug-in asks for."""

    class NeedsEverything(Toy):
        needs = tuple(MAKERS)

    with checks.registered(NeedsEverything) as name:
        extras = checks.visual_for(name, 2).extras
    assert set(extras) == set(MAKERS) - {"features", "projector"}
    for key, value in extras.items():
        assert len(value) == 2, key
        assert all(isinstance(entry, int) or entry.isfinite().all() for entry in value)
