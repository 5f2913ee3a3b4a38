"""One suite over every registered family: who is pruned, and what stays of it on a model."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from family_checks import GREEDY, NAMES, ROWS, error, inputs_of, shared_model, tiny
from torch import nn

from llava.pruning import PruningError, attach, detach, prune

each_family = pytest.mark.parametrize("name", NAMES)


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that pruning may touch."""
    hooks = [
        (name, key, [*value])
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and hasattr(value, "__len__") and len(value)
    ]
    return {
        "state": [*model.state_dict()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "generate": model.generate,
        "hooks": hooks,
        # What saving sets on every model.
        "config": {**model.config.to_dict(), "architectures": None, "dtype": None},
        "generation config": model.generation_config.to_dict(),
        "signatures": [inspect.signature(model.generate), inspect.signature(model.forward)],
    }


@each_family
def test_a_block_leaves_no_trace(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    model(**inputs)  # the first call of a tower leaves hooks of transformers on it
    before = state_of(model)
    with prune(model, "divprune", keep_ratio=0.4) as run:
        assert state_of(model)["signatures"] == before["signatures"]
        model.generate(**inputs, **GREEDY)
        assert run.trace is not None
        with prune(model, "zoo", keep_ratio=0.2), prune(model):
            model(**inputs)
    assert state_of(model) == before
    with pytest.raises(ZeroDivisionError), prune(model, "divprune", keep_ratio=0.4):
        1 / 0  # noqa: B018
    with pytest.raises(PruningError), prune(model, "divprune", keep_ratio=0.4):
        model.generate(**{**inputs, "input_ids": inputs["input_ids"][:, 5:]}, **GREEDY)
    with prune(model, "divprune", keep_ratio=0.4), pytest.raises((TypeError, ValueError)):
        model.generate(**inputs, **GREEDY, nonsense=True)
    assert state_of(model) == before


@each_family
def test_blocks_may_end_in_any_order(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    stock, before = model(**inputs).logits, state_of(model)
    outer, inner = prune(model, "divprune", keep_ratio=0.5), prune(model, "grid", keep_ratio=0.2)
    first, second = outer.__enter__(), inner.__enter__()
    few = model(**inputs).logits
    outer.__exit__(None, None, None)
    assert torch.equal(model(**inputs).logits, few) and first.trace is None
    inner.__exit__(None, None, None)
    assert second.trace is not None and state_of(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@each_family
def test_threads_and_tasks_have_settings_of_their_own(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, ROWS[:1])
    model(**inputs)
    before = state_of(model)
    settings: list[dict[str, Any]] = [{"keep_ratio": 0.3}, {"keep_ratio": 0.6}, {}]

    def work(setting: dict[str, Any]) -> list[Any]:
        if not setting:
            return [model.generate(**inputs, **GREEDY) for _ in range(2)]
        with prune(model, "divprune", **setting):
            return [model.generate(**inputs, **GREEDY) for _ in range(2)]

    wanted = [work(setting)[0].logits for setting in settings]
    assert error(wanted[0], wanted[1]) > 1e-3 < error(wanted[1], wanted[2])
    found: dict[int, list[Any]] = {}
    barrier = threading.Barrier(3)

    def run(number: int) -> None:
        barrier.wait()
        found[number] = work(settings[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(wanted):
        assert all(error(one.logits, logits) <= 1e-6 for one in found[number])

    async def request(setting: dict[str, Any]) -> Any:
        if not setting:
            await asyncio.sleep(0)
            return model(**inputs).logits
        with prune(model, "divprune", **setting):
            await asyncio.sleep(0)
            return model(**inputs).logits

    async def every() -> list[Any]:
        return [*await asyncio.gather(*map(request, settings))]

    for logits, first in zip(asyncio.run(every()), wanted, strict=True):
        assert error([logits[:, -1]], first[:1]) <= 1e-5
    assert state_of(model) == before


def test_a_block_reaches_into_a_copied_context_until_it_ends() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava")
    stock = model(**inputs).logits
    with prune(model, "divprune", keep_ratio=0.3):
        wanted = model(**inputs).logits
        copied = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(copied.run, lambda: model(**inputs).logits).result()
        assert torch.equal(found, wanted)
    assert wanted.shape != stock.shape
    with prune(model, "grid", keep_ratio=0.3):  # hooks are there for whoever needs them
        assert torch.equal(copied.run(lambda: model(**inputs).logits), stock)


@each_family
def test_attached_settings_are_saved_and_undone(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name).build(), inputs_of(name)
    model(**inputs)  # the first call of a tower leaves hooks of transformers on it
    before = state_of(model)
    with prune(model, "divprune", keep_ratio=0.4, positions="original"):
        wanted = model.generate(**inputs, **GREEDY)
    attach(model, "divprune", keep_ratio=0.4, positions="original")
    attached = model.generate(**inputs, **GREEDY)
    assert torch.equal(attached.sequences, wanted.sequences)
    with prune(model):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert again(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    attach(again)
    found = again.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, wanted.sequences)
    assert error(found.logits, wanted.logits) <= 1e-6
    detach(model)
    assert state_of(model) == before
    detach(again)
    with pytest.raises(PruningError, match="without a pruning setting"):
        attach(again)


class Wrapped(nn.Module):
    """As PEFT wraps models: calls go on, `get_base_model` gives the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = model

    def get_base_model(self) -> Any:
        return self.base

    def forward(self, **inputs: Any) -> Any:
        return self.base(**inputs)


@each_family
def test_models_inside_wrappers_are_found(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.4):
        wanted = model(**inputs).logits
    for wrapped in (Wrapped(model), nn.DataParallel(model), Wrapped(nn.DataParallel(model))):
        with prune(wrapped, "divprune", keep_ratio=0.4):
            assert torch.equal(wrapped(**inputs).logits, wanted)


def test_lora_by_peft() -> None:
    model, inputs = tiny("llava").build(), inputs_of("llava")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    stock = wrapped.generate(**inputs, **GREEDY)
    with prune(wrapped, "divprune", keep_ratio=1.0):
        assert torch.equal(wrapped.generate(**inputs, **GREEDY).sequences, stock.sequences)
    with prune(wrapped, "divprune", keep_ratio=0.4) as run:
        wrapped.generate(**inputs, **GREEDY)
    assert run.trace.tokens_after == [6, 6, 6]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "llava" else pytest.mark.slow) for name in NAMES],
)
def test_a_compiled_language_model(name: str) -> None:
    model, inputs = tiny(name).build(), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.4):
        wanted = model.generate(**inputs, **GREEDY)
    model.model.language_model.compile(backend="eager", dynamic=True)
    with prune(model, "divprune", keep_ratio=0.4):
        found = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    assert torch.equal(found.sequences, wanted.sequences)
    assert error(found.logits, wanted.logits) <= 1e-5
