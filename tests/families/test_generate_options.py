"""One suite over every registered family: what callers may ask of `generate`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from family_checks import GREEDY, NAMES, ROWS, STEPS, Shortened, error, inputs_of, shared_model
from torch import Tensor
from transformers.generation import BaseStreamer

from llava.pruning import PruningError, prune
from llava.pruning.lookup import FAMILIES

each_family = pytest.mark.parametrize("name", NAMES)


def pruned(name: str, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    model = shared_model(name)
    with prune(model, "divprune", keep_ratio=0.4):
        return model.generate(**(inputs or inputs_of(name)), **{**GREEDY, **options})


@each_family
def test_sampling_follows_the_seed(name: str) -> None:
    draws = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draws.append(pruned(name, do_sample=True, num_return_sequences=2))
    length = inputs_of(name)["input_ids"].shape[1]
    one, same, other = (draw.sequences for draw in draws)
    assert one.shape == (2 * len(ROWS), length + STEPS)
    assert torch.equal(one[::2, :length], inputs_of(name)["input_ids"])
    assert torch.equal(one, same) and not torch.equal(one, other)
    # Several sequences of a prompt come one after the other and begin alike.
    assert torch.equal(draws[0].logits[0][::2], draws[0].logits[0][1::2])


@each_family
def test_beams_are_scored_by_an_uncached_reference(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with prune(model, "divprune", keep_ratio=0.4) as run:
        found = model.generate(**inputs, **{**GREEDY, **options})
    short = Shortened(FAMILIES.get(name)(), model, inputs, run.tokens)
    for number, sequence in enumerate(found.sequences):
        new = sequence[-STEPS:].tolist()
        logits = [short.logits(number // 2, new[:step]) for step in range(STEPS)]
        steps = [float(own.log_softmax(-1)[token]) for own, token in zip(logits, new, strict=True)]
        assert abs(sum(steps) / STEPS - float(found.sequences_scores[number])) <= 1e-4


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended = True


@each_family
def test_a_streamer_hears_the_callers_prompt_first(name: str) -> None:
    inputs, listener = inputs_of(name, ROWS[:1]), Listener()
    found = pruned(name, inputs, streamer=listener)
    assert torch.equal(listener.heard[0], inputs["input_ids"]) and listener.ended
    assert torch.cat([part.flatten() for part in listener.heard[1:]]).tolist() == (
        found.sequences[0, -STEPS:].tolist()
    )


@each_family
def test_lengths_count_the_callers_prompt(name: str) -> None:
    inputs = inputs_of(name)
    length, wanted = inputs["input_ids"].shape[1], pruned(name).sequences
    longest = {"max_new_tokens": None, "max_length": length + 3}
    assert torch.equal(pruned(name, **longest).sequences, wanted[:, : length + 3])
    plain = pruned(name, return_dict_in_generate=False)
    assert torch.equal(plain, wanted)
    # A model that would stop at once goes on until the least length.
    ends = wanted[:1, length].tolist()
    one = inputs_of(name, ROWS[:1])
    before = one["input_ids"].shape[1]
    assert pruned(name, one, eos_token_id=ends).sequences.shape[1] == before + 1
    least = pruned(name, one, eos_token_id=ends, min_length=before + 3)
    assert least.sequences.shape[1] >= before + 3


@each_family
def test_caches_of_every_kind_give_the_same(name: str) -> None:
    wanted, every = pruned(name), [{"cache_implementation": "static"}, {"use_cache": False}]
    if name == "paligemma" and version("transformers") < "5.18":
        every.pop()  # without a cache, that release lets answers and prompt see each other
    for options in every:
        found = pruned(name, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        assert error(found.logits, wanted.logits) <= 1e-5


@each_family
def test_ids_may_come_first_and_positional(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.4):
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        found = model.generate(inputs["input_ids"], **rest, **GREEDY)
    assert torch.equal(found.sequences, pruned(name).sequences)


def test_a_prompt_is_not_read_in_parts() -> None:
    with pytest.raises(PruningError, match="prefill_chunk_size=7"):
        pruned("llava", prefill_chunk_size=7)
