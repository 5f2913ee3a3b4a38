"""What is set around a call changes nothing: autocast, default dtype, generators, other callers."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pruning_checks as checks
import pytest
import torch
from torch import Tensor, nn

from llava.pruning import (
    PruningConfig,
    PruningError,
    VisualTokens,
    get_method,
    importance_of,
    list_methods,
    max_min,
    prune,
    prune_visual_tokens,
    select,
    sensitivity,
)
from llava.pruning.active import Prunable
from llava.pruning.importance.projectors import low_rank
from llava.pruning.importance.sensitivity import direction_bank
from llava.pruning.importance.similarity import distinctiveness, text_relevance
from llava.pruning.selection.dpp import dpp
from llava.pruning.selection.max_min import cosine
from llava.utils import once

METHODS = [name for name in list_methods() if get_method(name).budgeted]
FUSED = {"projector_rank": 4}
OPTIONS = [
    *((name, {}) for name in METHODS),
    ("zoo", FUSED),
    ("zoo", FUSED | {"projector_weights": "untrained"}),
    ("cen-prune", {"host": "zoo"}),
    ("cen-prune", {"host": "cdpruner"}),
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
}


def outcome(visual: VisualTokens, config: PruningConfig) -> dict[str, Tensor | None]:
    pruned = prune_visual_tokens(visual, config)
    return {
        "projected": pruned.projected,
        "kept": pruned.kept,
        "sources": pruned.sources,
        "margins": pruned.trace.margins,
    }


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_surroundings_change_nothing(name: str, options: dict, around: str) -> None:
    config = PruningConfig(name, keep_tokens=9, options=options)
    direction_bank.cache_clear()
    with torch.no_grad():
        want = outcome(checks.visual_for(name), config)
        direction_bank.cache_clear()  # what was drawn before must not hide what would be drawn
        visual = checks.visual_for(name)
        with SURROUNDINGS[around]():
            got = outcome(visual, config)
    for key, value in want.items():
        if value is None:
            assert got[key] is None
        else:
            assert got[key].dtype == value.dtype, key
            assert torch.equal(got[key], value), key


def tokens(count: int = 576, width: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    """A projector, features [N, Dv] and projected tokens [N, D] with close scores and distances."""
    generator = torch.Generator().manual_seed(0)
    projector = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, 80))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        features = torch.randn(count, width, generator=generator)
        return projector, features, projector(features)


@pytest.mark.parametrize("name", ["zoo", "zoo-exact", "divprune"])
def test_autocast_keeps_all_64_tokens(name: str) -> None:
    projector, features, projected = tokens()
    given = {"projected": projected, "features": features, "projector": projector}
    want = select(name, keep_tokens=64, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(name, keep_tokens=64, **given), want)


def test_functions_of_the_core_are_outside_autocast() -> None:
    projector, features, projected = tokens(count=64)
    visual = checks.visual_for("zoo")
    config = PruningConfig("zoo", keep_tokens=8)

    def everything() -> list[Tensor]:
        return [
            sensitivity(projector, features),
            sensitivity(projector, features, estimator="exact"),
            max_min(projected[None], 16, first="isolated"),
            importance_of(config, visual),
            # What methods of others compose themselves of.
            dpp(projected[None], 16).margins,
            distinctiveness(projected[None]),
            text_relevance(features, features[:3]),
            cosine(projected),
            low_rank(copy.deepcopy(projector), 4)[0].weight,
        ]

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
        # The caller's own products stay lowered: autocast comes back after each call.
        assert torch.mm(projected.detach(), projected.detach().T).dtype == torch.bfloat16
    for wanted, given in zip(want, got, strict=True):
        assert torch.equal(wanted, given)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_no_global_generator_is_moved(name: str, options: dict) -> None:
    visual = checks.visual_for(name)
    direction_bank.cache_clear()
    before = torch.random.get_rng_state()
    prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9, options=options))
    assert torch.equal(torch.random.get_rng_state(), before)


class Dropping(nn.Module):
    """A projector whose outputs are noise while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.Dropout(0.5), nn.Linear(16, 14))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square()


def test_a_projector_in_training_is_scored_without_being_switched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    projector = Dropping()
    features = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    want = [sensitivity(projector.eval(), features, estimator=e) for e in ("zeroth_order", "exact")]
    projector.train()
    switched: list[nn.Module] = []
    own = nn.Module.__setattr__

    def watched(module: nn.Module, name: str, value: object) -> None:
        if name == "training" and any(module is m for m in projector.modules()):
            switched.append(module)
        own(module, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", watched)
        got = [sensitivity(projector, features, estimator=e) for e in ("zeroth_order", "exact")]
    assert switched == []
    assert all(module.training for module in projector.modules())
    for wanted, given in zip(want, got, strict=True):
        assert torch.equal(wanted, given)


# --- prune(...) is the caller's own ---------------------------------------------------------------


class Model(Prunable):
    """The smallest thing that can be pruned."""


def in_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_block_is_seen_by_its_caller_alone() -> None:
    model = Model()
    model.pruning = default = PruningConfig("grid", keep_tokens=4)
    with prune(model, "zoo", keep_tokens=64) as run:
        assert model.pruning is run.config
        assert in_thread(lambda: model.pruning) is default
        # As with torch.no_grad, a thread takes it along where it is given the caller's context.
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(lambda: model.pruning)) is run.config
    assert model.pruning is default


def test_blocks_of_two_models_and_the_default() -> None:
    one, other = Model(), Model()
    with prune(one, "zoo", keep_tokens=64) as first, prune(other, "norm", keep_tokens=3) as second:
        assert (one.pruning, other.pruning) == (first.config, second.config)
        one.pruning = PruningConfig("grid", keep_tokens=9)  # the default, not the block's setting
        assert one.pruning is first.config
        assert in_thread(lambda: one.pruning) == PruningConfig("grid", keep_tokens=9)
    assert one.pruning == PruningConfig("grid", keep_tokens=9)
    assert other.pruning is None


def streaming(model: Model, keep: int) -> Iterator[int | None]:
    """A generator with a block of its own, as of a server that streams its answer."""
    with prune(model, "zoo", keep_tokens=keep):
        for _ in range(2):
            setting = model.pruning
            yield None if setting is None else setting.keep_tokens


def test_generators_that_take_turns_leave_nothing_behind() -> None:
    model = Model()
    one, other = streaming(model, 8), streaming(model, 16)
    assert [next(one), next(other)] == [8, 16]
    one.close()  # the first to begin is the first to end
    assert model.pruning is not None and model.pruning.keep_tokens == 16
    other.close()
    assert model.pruning is None


def test_a_generator_may_go_on_in_other_threads() -> None:
    """Web servers run every step of a generator in a context of its own."""
    model = Model()
    stream = streaming(model, 8)
    steps = [in_thread(lambda: next(stream, "end")) for _ in range(3)]
    assert steps[0] == 8 and steps[-1] == "end"
    assert model.pruning is None
    begun_here = streaming(model, 8)
    next(begun_here)
    in_thread(begun_here.close)


def test_settings_as_users_write_them() -> None:
    model = Model()
    with prune(model, {"method": "zoo", "keep_tokens": 8}) as run:
        assert run.config == model.pruning == PruningConfig("zoo", keep_tokens=8)
    for wrong in (5, PruningConfig, ["zoo"]):
        with pytest.raises(PruningError, match="must be a PruningConfig, its dict form"):
            prune(model, wrong).__enter__()
    with pytest.raises(PruningError, match="unknown pruning setting"):
        prune(model, {"methods": "zoo"}).__enter__()


def test_a_wrapper_that_passes_attributes_on_prunes_its_model() -> None:
    class Wrapper:
        def __init__(self, inner: Model) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    model = Model()
    with prune(Wrapper(model), "zoo", keep_tokens=64) as run:
        assert model.pruning is run.config


# --- llava.utils.once -----------------------------------------------------------------------------


def test_once_makes_other_threads_wait() -> None:
    entered, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    @once
    def load() -> None:
        entered.set()
        load()  # from inside: returns at once
        assert go_on.wait(10)
        done.append("loaded")

    first = threading.Thread(target=load)
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=lambda: (load(), done.append("second")))
    second.start()
    second.join(0.1)
    assert done == []
    go_on.set()
    first.join(10)
    second.join(10)
    assert done == ["loaded", "second"]


def test_once_tries_again_after_an_error() -> None:
    calls = []

    @once
    def load() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("not this time")

    with pytest.raises(OSError):
        load()
    load()
    load()
    assert len(calls) == 2
