"""Each check of pruning between layers fails when the line it guards is broken: planted faults."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import test_decoder_goldens as goldens
import test_decoder_methods as checks
import torch
from torch import Tensor

from llava.pruning.decoder import call, method
from llava.pruning.decoder.prefill import Prefill
from llava.pruning.decoder.segments import Steps

model = checks.model
scores = goldens.scores


def planted(function: Callable[..., Any], line: str, fault: str) -> Callable[..., Any]:
    """Return a function with one piece of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{line!r} is no longer in {function.__qualname__}"
    names: dict[str, Any] = dict(inspect.unwrap(function).__globals__)
    exec(source.replace(line, fault), names)
    mutated: Callable[..., Any] = names[function.__name__]
    return mutated


# Name -> what is broken: the owner, its function, the line and what stands there instead.
FAULTS: dict[str, tuple[Any, str, str, str]] = {
    "order of kept columns": (
        *(Prefill, "_gather"),
        "torch.where(keep, 2 * every, -1)",
        "torch.where(keep, 2 * every.flip(0), -1)",
    ),
    "kept columns not sorted": (
        *(Prefill, "_cut"),
        "raster_order(self.method.select(stage, scores, asked))",
        "self.method.select(stage, scores, asked).flip(1)",
    ),
    "padding not masked behind a cut": (
        *(Prefill, "_number"),
        "valid if padded else None",
        "None",
    ),
    "padding not masked in steps": (
        *(Steps, "_inputs_of"),
        "if segment.padded or self._more is not None:",
        "if False:",
    ),
    "padding attended to by scores": (
        *(method, "attention_rows"),
        " & valid[:, None]",
        "",
    ),
    "compact positions off by one": (
        *(Prefill, "_number"),
        "(valid.long().cumsum(dim=1) - 1)",
        "valid.long().cumsum(dim=1)",
    ),
    "positions of steps off by one": (
        *(Steps, "_inputs_of"),
        "- shift.to(hidden.device)",
        "- shift.to(hidden.device) + 1",
    ),
    "shift of another row": (
        *(Steps, "_inputs_of"),
        "segment.shift.repeat_interleave(times, 0)",
        "segment.shift.roll(1).repeat_interleave(times, 0)",
    ),
    "cut one layer late": (
        *(Prefill, "__init__"),
        "self.method.adapt(plan, columns, i)",
        "Schedule(tuple(layer + 1 for layer in plan.layers), plan.keep, plan.made)",
    ),
    "segment found one layer late": (
        *(Steps, "before_layer"),
        "s.first <= layer",
        "s.first < max(layer, 1)",
    ),
    "made tokens before the image": (
        *(Prefill, "_with_made"),
        "= 2 * last + 1",
        "= 2 * stage.columns[image, 0] - 1",
    ),
    "cache mark lost": (
        *(call.DecoderCall, "end"),
        "remember(own.cache, own.segments)",
        "pass",
    ),
    "scores of another image": (
        *(Prefill, "_cut"),
        "self._score(layer, hidden, layer) if scores is None else scores.to(hidden.device)",
        "(self._score(layer, hidden, layer) if scores is None else scores).roll(1, 0)",
    ),
    "scores of the token before the last": (
        *(method.Stage, "attention"),
        "self.last[:, None] if",
        "self.last[:, None] - 1 if",
    ),
    "hidden states of dropped columns": (
        *(Prefill, "_gather"),
        "hidden = take_columns(hidden, columns)",
        "hidden = hidden[:, -width:]",
    ),
    "positions of dropped columns": (
        *(Prefill, "_number"),
        "take_columns(cos, columns), take_columns(sin, columns)",
        "cos[:, : len(columns[0])], sin[:, : len(columns[0])]",
    ),
}

Check = Callable[[Any, list[Tensor]], None]


def recomputing(name: str) -> Check:
    """Decoding equals recomputing."""
    return lambda model, scores: checks.test_decoding_equals_recomputing(model, name, {})


def batches(name: str) -> Check:
    """A batch with left padding and two images equals its rows."""
    return lambda model, scores: checks.test_batch_equals_its_rows(model, name, {}, "left")


def planning(name: str) -> Check:
    """Layers read as many tokens as planned."""
    return lambda model, scores: checks.test_layers_read_as_many_as_planned(model, name, {})


def official(name: str) -> Check:
    """A recorded run of the released program: hidden states, kept tokens, scores, lengths."""

    def check(model: Any, scores: list[Tensor]) -> None:
        scores.clear()
        goldens.test_official_run(name, torch.float64, scores)

    return check


def positions(name: str) -> Check:
    """Positions of a recorded run."""
    return lambda model, scores: goldens.test_positions(name)


def first(method: str) -> str:
    """Name of a method's first recorded run."""
    return next(name for name in goldens.CASES if name.startswith(method))


CASES: list[tuple[str, Check]] = [
    ("order of kept columns", recomputing("fastv")),
    ("order of kept columns", official(first("fastv"))),
    ("kept columns not sorted", official(first("fastv"))),
    ("padding not masked behind a cut", batches("fastv")),
    ("padding not masked behind a cut", batches("btp")),
    ("padding not masked in steps", batches("fastv")),
    ("padding attended to by scores", batches("pyramiddrop")),
    ("compact positions off by one", positions(first("pyramiddrop"))),
    ("positions of steps off by one", recomputing("pyramiddrop")),
    ("positions of steps off by one", official(first("pyramiddrop"))),
    ("shift of another row", batches("pyramiddrop")),
    ("cut one layer late", planning("fastv")),
    ("cut one layer late", planning("pyramiddrop")),
    ("cut one layer late", official(first("pyramiddrop"))),
    ("segment found one layer late", recomputing("pyramiddrop")),
    ("segment found one layer late", official(first("sparsevlm"))),
    ("made tokens before the image", official(first("sparsevlm"))),
    ("cache mark lost", recomputing("pyramiddrop")),
    ("cache mark lost", positions(first("pyramiddrop"))),
    ("scores of another image", batches("fastv")),
    ("scores of another image", batches("sparsevlm")),
    ("scores of the token before the last", official(first("fastv"))),
    ("hidden states of dropped columns", recomputing("fastv")),
    ("positions of dropped columns", recomputing("fastv")),
]


@pytest.mark.parametrize(("fault", "check"), CASES, ids=[case[0] for case in CASES])
def test_check_fails_under_fault(
    fault: str, check: Check, model: Any, scores: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(model, scores)
    owner, name, line, broken = FAULTS[fault]
    monkeypatch.setattr(owner, name, planted(getattr(owner, name), line, broken))
    with pytest.raises(AssertionError):
        check(model, scores)


def test_every_fault_is_noticed() -> None:
    assert {fault for fault, _ in CASES} == FAULTS.keys()
