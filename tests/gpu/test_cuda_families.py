"""Models of all families on a GPU keep and say what they do on the CPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.pruning import prune

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family_checks import GREEDY, NAMES, error, inputs_of, shared_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("method", ["zoo-exact", "zoo", "divprune", "visionzip"])
@pytest.mark.parametrize("name", NAMES)
def test_a_family_answers_as_on_the_cpu(name: str, method: str) -> None:
    here, inputs = shared_model(name), inputs_of(name)
    there = copy.deepcopy(here).to(DEVICE)
    with prune(here, method, keep_ratio=0.5) as run:
        wanted = here.generate(**inputs, **GREEDY)
    with prune(there, method, keep_ratio=0.5) as own:
        output = there.generate(**on_device(inputs), **GREEDY)
    assert run.trace is not None and own.trace is not None
    assert own.trace.tokens_after == run.trace.tokens_after
    if run.trace.kept is not None and own.trace.kept is not None:
        assert torch.equal(own.trace.kept.cpu(), run.trace.kept)
    assert torch.equal(output.sequences.cpu(), wanted.sequences)
    assert error([step.cpu() for step in output.logits], wanted.logits) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs(name: str) -> None:
    model = copy.deepcopy(shared_model(name)).to(DEVICE, torch.bfloat16)
    inputs = on_device(inputs_of(name))
    with prune(model, "zoo-exact", keep_ratio=0.5) as run:
        output = model.generate(**inputs, **GREEDY)
    assert run.trace is not None and run.trace.tokens_after != run.trace.tokens_before
    assert all(step.isfinite().all() for step in output.logits)
