"""Calls inside calls, caches that were changed, copies of a model, assisted decoding."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from family_checks import GREEDY, NAMES, error, inputs_of, shared_model, tiny
from test_traces import state_of
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    PixtralVisionConfig,
    StaticCache,
    StoppingCriteria,
)

from llava.pruning import PruningError, attach, detach, prune

ONE = [[(56, 40)]]
SETTING: dict[str, Any] = {"config": "divprune", "keep_ratio": 0.4}
each_family = pytest.mark.parametrize("name", NAMES)
some = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])


def text_of(name: str) -> dict[str, Any]:
    """A prompt without any image."""
    ids = torch.arange(5, 14)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs_of(name, ONE):
            inputs[key] = torch.zeros_like(ids)
    return inputs


@each_family
def test_assisted_decoding_sees_the_pruned_image(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, ONE)
    settings = {**GREEDY, "prompt_lookup_num_tokens": 3}
    try:
        stock = model.generate(**inputs, **settings).sequences
    except (ValueError, NotImplementedError) as refusal:
        pytest.skip(f"transformers refuses: {str(refusal)[:60]}")
    if not torch.equal(stock, model.generate(**inputs, **GREEDY).sequences):
        pytest.skip("transformers' own assisted decoding differs from greedy decoding here")
    with prune(model, **SETTING):
        wanted = model.generate(**inputs, **GREEDY).sequences
        assert torch.equal(model.generate(**inputs, **settings).sequences, wanted)


@some
def test_a_call_inside_generate_is_a_call_of_its_own(name: str) -> None:
    model, inputs, text = shared_model(name), inputs_of(name, ONE), text_of(name)
    with torch.no_grad():
        alone = model(**text).logits
    with prune(model, **SETTING), torch.no_grad():
        shown = model(**inputs).logits
        wanted = model.generate(**inputs, **GREEDY)
    seen: list[Any] = []

    class Nested(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                seen.append((model(**text).logits, model(**inputs).logits))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with prune(model, **SETTING):
        found = model.generate(**inputs, **GREEDY, stopping_criteria=[Nested()])
    assert len(seen) > 1
    for own_text, own_image in seen:
        assert torch.equal(own_text, alone)
        assert torch.equal(own_image, shown)
    assert torch.equal(found.sequences, wanted.sequences)
    assert error(found.logits, wanted.logits) <= 1e-6


@some
def test_a_failing_call_leaves_nothing_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, text = shared_model(name), inputs_of(name, ONE), text_of(name)
    with torch.no_grad(), prune(model):
        alone = model(**text).logits

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with prune(model, **SETTING), torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", fail)
            with pytest.raises(MemoryError):
                model(**inputs)
        assert torch.equal(model(**text).logits, alone)


@some
def test_a_cache_that_was_emptied_or_copied(name: str) -> None:
    model, inputs, text = shared_model(name), inputs_of(name, ONE), text_of(name)
    language = model.config.get_text_config()
    with torch.no_grad():
        alone = model(**text).logits
    with prune(model, **SETTING), torch.no_grad():
        cache = DynamicCache(config=language)
        first = model(**inputs, past_key_values=cache, use_cache=True, return_dict=False)[0]
        token = first[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
        copied = copy.deepcopy(cache)
        after = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        again = model(input_ids=token, attention_mask=mask, past_key_values=copied).logits
        assert torch.equal(after, again)
        steps = model.generate(**inputs, **GREEDY).logits
        assert error([after[:, -1]], [steps[1]]) <= 1e-5
        copied.crop(8 - copied.get_seq_length())
        with pytest.raises(PruningError, match="the cache was cut to 8 of the"):
            model(input_ids=token, past_key_values=copied)
        static = StaticCache(config=language, max_cache_len=64)
        model(**inputs, past_key_values=static, use_cache=True)
        static.reset()
        assert error([model(**text, past_key_values=static).logits], [alone]) <= 1e-5


def test_an_image_after_a_cache_is_refused() -> None:
    model, inputs, text = shared_model("llava"), inputs_of("llava", ONE), text_of("llava")
    with prune(model, **SETTING), torch.no_grad():
        cache = model(**text, use_cache=True).past_key_values
        mask = torch.ones(1, text["input_ids"].shape[1] + inputs["input_ids"].shape[1])
        with pytest.raises(PruningError, match="an image after a cache cannot be pruned"):
            model(**{**inputs, "attention_mask": mask.long()}, past_key_values=cache)


@some
def test_a_pruned_cache_goes_on_where_pruning_is_off(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, ONE)
    with prune(model, **SETTING):
        output = model.generate(**inputs, **GREEDY)
        ids = torch.cat([output.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        caches = [copy.deepcopy(output.past_key_values) for _ in range(2)]
        wanted = model.generate(**longer, **GREEDY, past_key_values=caches[0]).sequences
        with prune(model):
            found = model.generate(**longer, **GREEDY, past_key_values=caches[1]).sequences
    assert torch.equal(found, wanted)


def test_several_answers_go_on_from_one_cache() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava", ONE)
    settings = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    with prune(model, **SETTING):
        torch.manual_seed(0)
        output = model.generate(**inputs, **settings)
        ids = torch.cat([output.sequences, torch.tensor([[7, 8]] * 2)], dim=1)
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = model.generate(**longer, **GREEDY, past_key_values=output.past_key_values)
        pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
        wanted = model.generate(**longer, **GREEDY, pixel_values=pixels)
    assert torch.equal(found.sequences, wanted.sequences)


@each_family
def test_copies_of_an_attached_model_are_stock_models(name: str) -> None:
    model, inputs = tiny(name).build(), inputs_of(name, ONE)
    attach(model, "divprune", keep_ratio=0.4)
    # Before the first call: transformers' own hooks, which it adds then, cannot be pickled.
    copies = [pickle.loads(pickle.dumps(model))]
    pruned = model.generate(**inputs, **GREEDY)
    copies.append(copy.deepcopy(model))
    with prune(model):
        stock = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other.generate(**inputs, **GREEDY).sequences, stock.sequences)
            attach(other)
            assert torch.equal(other.generate(**inputs, **GREEDY).sequences, pruned.sequences)
            detach(other)
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, pruned.sequences)


def test_an_attached_model_is_freed_with_its_last_reference() -> None:
    model = tiny("llava").build()
    attach(model, "divprune", keep_ratio=0.4)
    model.generate(**inputs_of("llava", ONE), **GREEDY)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_tower_that_cannot_be_read_leaves_the_model_as_it_is() -> None:
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=shared_model("llava").config.text_config)
    model = LlavaForConditionalGeneration(config)
    before = state_of(model)
    for _ in range(2):
        with pytest.raises(PruningError, match="pixtral"), prune(model, "zoo", keep_tokens=4):
            pass
        assert state_of(model) == before


def test_a_row_of_padding_alone() -> None:
    model = shared_model("llava")
    inputs = inputs_of("llava", [[(28, 28)], []])
    inputs["attention_mask"][1] = 0
    with prune(model, **SETTING), torch.no_grad():
        assert model(**inputs).logits.isfinite()[0].all()


def test_arguments_that_count_columns() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava", ONE)
    length = inputs["input_ids"].shape[1]
    with prune(model, **SETTING):
        with pytest.raises(PruningError, match="logits_to_keep as a tensor"):
            model(**inputs, logits_to_keep=torch.tensor([length - 1]))
        with pytest.raises(PruningError, match=rf"max_length=5 leaves no room .* {length} tokens"):
            model.generate(**inputs, max_length=5)
        with pytest.raises(PruningError, match=r"attention_mask must be .* got dict"):
            model(**{**inputs, "attention_mask": {"full": None}})
        own = GenerationConfig(max_length=length + 3, pad_token_id=0, eos_token_id=None)
        assert model.generate(**inputs, generation_config=own).shape[1] == length + 3
        assert own.max_length == length + 3


def test_criteria_and_processors_see_the_prompts_of_the_caller() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava", ONE)
    ids, seen = inputs["input_ids"], []

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids)
            return scores

    def allowed(row: int, sequence: Any) -> list[int]:
        seen.append(sequence[None])
        return list(range(100))

    with prune(model, **SETTING):
        model.generate(
            **inputs,
            **GREEDY,
            stopping_criteria=[Criterion()],
            logits_processor=[Processor()],
            prefix_allowed_tokens_fn=allowed,
        )
    assert len(seen) == 3 * GREEDY["max_new_tokens"]
    assert all(torch.equal(sequence[:, : ids.shape[1]], ids) for sequence in seen)
    assert max(sequence.shape[1] for sequence in seen) > ids.shape[1]


def test_a_run_tells_of_its_last_call() -> None:
    model = shared_model("llava_next")
    with prune(model, "divprune", keep_tokens=60) as run:
        model(**inputs_of("llava_next", [[(56, 56)]]))
        assert run.trace is not None
        model(**inputs_of("llava_next", [[(28, 28)]]))
        assert run.tokens is not None
        assert run.trace is None or run.trace.tokens_after != run.trace.tokens_before
    with prune(model, "divprune", keep_tokens=10**6) as run:
        model(**inputs_of("llava_next", [[(28, 28)]]))
        assert run.tokens is not None and run.trace is None


def test_questions_are_taken_where_pruning_is_off() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava", ONE)
    with prune(model):
        found = model.generate(**inputs, **GREEDY, questions=["What is it?"])
    assert torch.equal(found.sequences, model.generate(**inputs, **GREEDY).sequences)


def test_a_compiled_model() -> None:
    model, inputs = tiny("llava").build(), inputs_of("llava", ONE)
    with prune(model, **SETTING), torch.no_grad():
        wanted = model(**inputs).logits
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with prune(compiled, **SETTING), torch.no_grad():
        found = compiled(**inputs).logits
    with torch.no_grad():
        stock = compiled(**inputs).logits
    torch._dynamo.reset()
    assert torch.allclose(found, wanted, atol=1e-5)
    assert stock.shape[1] == inputs["input_ids"].shape[1]
