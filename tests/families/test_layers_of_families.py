"""Pruning between layers of every family whose language model allows it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from itertools import count
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from decoder_checks import PYRAMID, READABLE, SETTINGS, Layered
from family_checks import GREEDY, NAMES, ROWS, STEPS, error, inputs_of, shared_model, tiny
from test_generate_options import Listener

from llava.pruning import PruningError, prune
from llava.pruning.lookup import FAMILIES

each_readable = pytest.mark.parametrize("name", READABLE)
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def generated(name: str, setting: str, inputs: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return the run and what `generate` returns."""
    model = shared_model(name)
    with prune(model, **SETTINGS[setting]) as run:
        found = model.generate(**(inputs or inputs_of(name)), **{**GREEDY, **options})
    return run, found


def reference(name: str, run: Any, inputs: Any = None) -> Layered:
    inputs = inputs or inputs_of(name)
    return Layered(FAMILIES.get(name)(), shared_model(name), inputs, run)


def test_which_families_are_read() -> None:
    wanted = {"idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm"}
    assert {*READABLE} == wanted & {*NAMES}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READABLE])
def test_other_language_models_are_refused_before_anything_is_encoded(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, ROWS[:1])
    ran: list[Any] = []
    handle = (
        FAMILIES.get(name)().projector(model).register_forward_hook(lambda *call: ran.append(call))
    )
    try:
        with prune(model, **SETTINGS["zoo+fastv"]):
            for call in (model.generate, model):
                with pytest.raises(PruningError, match=r"between the layers of .*Model, only of"):
                    call(**inputs)
    finally:
        handle.remove()
    assert not ran


@each_readable
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_a_budget_of_all_tokens_is_the_stock_model(name: str, method: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with torch.no_grad():
        stock, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
        with prune(model, method, keep_ratio=1.0) as run:
            found = model.generate(**inputs, **GREEDY)
            assert torch.equal(model(**inputs).logits, logits)
    assert run.decoder_trace.tokens_mean == run.decoder_trace.tokens_in
    assert torch.equal(found.sequences, stock.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, stock.logits, strict=True))


@each_readable
@each_setting
def test_cached_decoding_is_an_uncached_loop_over_layers(name: str, setting: str) -> None:
    """Rows of different lengths, one with two images, one of text alone."""
    inputs = inputs_of(name)
    run, found = generated(name, setting)
    layered, trace = reference(name, run), run.decoder_trace
    for row in range(len(ROWS)):
        new, logits = layered.greedy(row, STEPS)
        assert found.sequences[row, -STEPS:].tolist() == new
        assert error([own[row] for own in found.logits], logits) <= 1e-5
    assert torch.equal(found.sequences[:, :-STEPS], inputs["input_ids"])
    # Every layer's cache is as long as its longest row, and the answer but its last token.
    texts = [len(c) for c in layered.short.columns]
    for image, (row, _) in enumerate(layered.short.images):
        texts[row] -= trace.tokens_in[image]
    for layer in range(trace.depth):
        rows = [*texts]
        for image, (row, _) in enumerate(layered.short.images):
            rows[row] += trace.per_layer[image][layer]
        assert found.past_key_values.get_seq_length(layer) == max(rows) + STEPS - 1
    assert all(last < first for first, last in zip(trace.tokens_in, trace.tokens_last, strict=True))
    assert trace.cache_bytes == sum(
        part.numel() * part.element_size() // part.shape[2] * (part.shape[2] - STEPS + 1)
        for own in found.past_key_values.layers
        for part in (own.keys, own.values)
    )


@each_readable
def test_a_batch_is_its_rows(name: str) -> None:
    for setting in ("fastv", "zoo+pyramiddrop"):
        _, found = generated(name, setting)
        for row in range(len(ROWS)):
            alone = inputs_of(name, ROWS[row : row + 1], row)
            _, own = generated(name, setting, alone)
            assert found.sequences[row, -STEPS:].tolist() == own.sequences[0, -STEPS:].tolist()
            assert error([x[row] for x in found.logits], [x[0] for x in own.logits]) <= 1e-5


@each_readable
def test_one_pass_returns_logits_of_every_token_read(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    for setting in ("pyramiddrop", "zoo+fastv"):
        with prune(model, **SETTINGS[setting]) as run, torch.no_grad():
            logits = model(**inputs).logits
        layered = reference(name, run)
        assert logits.shape[1] == max(map(len, layered.short.columns))
        for row in range(len(ROWS)):
            assert error([logits[row, -1]], [layered.logits(row, [])]) <= 1e-5


@each_readable
def test_the_stock_model_gets_its_arguments_as_they_are(name: str) -> None:
    model, inputs, seen = shared_model(name), inputs_of(name), []
    with prune(model, **SETTINGS["fastv"]):
        handle = model.register_forward_pre_hook(  # behind those of the block
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        try:
            model(**inputs)
        finally:
            handle.remove()
    assert len(seen) == 1
    assert all(seen[0][key] is inputs[key] for key in inputs)


@each_readable
def test_beams_are_scored_by_the_loop(name: str) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    # One image a prompt: transformers 5.17 mixes those of a prompt's beams itself.
    inputs = inputs_of(name, ROWS[1:], 1)
    run, found = generated(name, "pyramiddrop", inputs, **beams)
    layered = reference(name, run, inputs)
    for number, sequence in enumerate(found.sequences):
        new = sequence[-STEPS:].tolist()
        logits = [layered.logits(number // 2, new[:step]) for step in range(STEPS)]
        steps = [float(own.log_softmax(-1)[token]) for own, token in zip(logits, new, strict=True)]
        assert abs(sum(steps) / STEPS - float(found.sequences_scores[number])) <= 1e-4


@pytest.mark.parametrize("setting", ["fastv", "zoo+fastv"])
def test_a_streamer_hears_prompt_and_answer(setting: str) -> None:
    inputs, listener = inputs_of("llava", ROWS[:1]), Listener()
    _, found = generated("llava", setting, inputs, streamer=listener)
    assert torch.equal(listener.heard[0].cpu(), inputs["input_ids"]) and listener.ended
    heard = torch.cat([part.flatten() for part in listener.heard[1:]]).tolist()
    assert heard == found.sequences[0, -STEPS:].tolist()


@each_readable
@each_setting
def test_a_second_turn_goes_on_from_the_cache(name: str, setting: str) -> None:
    """By `generate`, pruning on and off, and by single calls of `forward`."""
    model, inputs = shared_model(name), inputs_of(name)
    caches = [generated(name, setting)[1].past_key_values for _ in range(2)]
    run, first = generated(name, setting)
    layered = reference(name, run)
    said = torch.tensor([[7, 8, 9], [10, 11, 12], [13, 14, 15]])
    ids = torch.cat([first.sequences, said], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS + 3).long()], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": mask}
    with prune(model, **SETTINGS[setting]):
        found = [model.generate(**longer, **GREEDY, past_key_values=caches[0])]
        with prune(model):
            found.append(model.generate(**longer, **GREEDY, past_key_values=caches[1]))
        with torch.no_grad():
            step = model(
                input_ids=torch.cat([first.sequences[:, -1:], said], dim=1),
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1)[:, -4:],
                past_key_values=first.past_key_values,
            )
    for row in range(len(ROWS)):
        before = ids[row, inputs["input_ids"].shape[1] :].tolist()
        for own in found:
            new = own.sequences[row, -STEPS:].tolist()
            wanted = [layered.logits(row, before + new[:step]) for step in range(STEPS)]
            assert error([x[row] for x in own.logits], wanted) <= 1e-5
        assert error([step.logits[row, -1]], [layered.logits(row, before)]) <= 1e-5


def test_threads_have_settings_of_their_own() -> None:
    names = [*SETTINGS, None]
    model, inputs = shared_model("llava"), inputs_of("llava")

    def ask(setting: str | None) -> Any:
        with prune(model, **SETTINGS[setting]) if setting else prune(model):
            return model.generate(**inputs, **GREEDY)

    wanted, found = [ask(setting) for setting in names], {}
    barrier = Barrier(len(names))

    def run(number: int) -> None:
        barrier.wait()
        found[number] = [ask(names[number]) for _ in range(2)]

    threads = [Thread(target=run, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(wanted):
        for other in found[number]:
            assert torch.equal(one.sequences, other.sequences)
            assert error(other.logits, one.logits) <= 1e-6


def test_a_method_that_merges_before_it() -> None:
    model, inputs = shared_model("llava"), inputs_of("llava", ROWS[:1])
    merging = {"config": "pool", "keep_tokens": 4, "decoder": PYRAMID}
    with prune(model, **merging) as run:
        found = model.generate(**inputs, **GREEDY)
    assert run.decoder_trace.per_layer == [[4, 2, 1], [4, 2, 1]]
    assert found.sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("needs the key cache.*leave use_cache=False out", {"use_cache": False}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ("prefill_chunk_size=7", {"prefill_chunk_size": 7}),
    ("need a DynamicCache, not StaticCache", {"cache_implementation": "static"}),
]


@pytest.mark.parametrize(("message", "options"), REFUSED)
@pytest.mark.parametrize("setting", ["fastv", "zoo+fastv"])
def test_settings_of_generate_that_are_refused(
    setting: str, message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(PruningError, match=message) as refusal:
        generated("llava", setting, **options)
    assert "\n" not in str(refusal.value)


def _cut(cache: Any, inputs: Any) -> dict[str, Any]:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :20], layer.values[:, :, :20]
    return {}


def _shown_again(cache: Any, inputs: Any) -> dict[str, Any]:
    return inputs


def _other_rows(cache: Any, inputs: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 60).long()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "the cache was cut to 20 tokens"),
        (_shown_again, "goes on with another image"),
        (_other_rows, "rows go on from it|prompts that were pruned between layers"),
    ],
)
def test_caches_that_do_not_go_on(change: Callable[..., Any], message: str) -> None:
    model, inputs = shared_model("llava"), inputs_of("llava")
    _, found = generated("llava", "fastv")
    given = {"input_ids": torch.tensor([[5], [6], [7]])}
    given |= change(found.past_key_values, inputs)
    with (
        prune(model, **SETTINGS["fastv"]),
        torch.no_grad(),
        pytest.raises(PruningError, match=message) as refusal,
    ):
        model(**given, past_key_values=found.past_key_values)
    assert "\n" not in str(refusal.value)


def test_training_is_refused() -> None:
    model = shared_model("llava")
    layers = model.model.language_model
    layers.train()
    try:
        with prune(model, **SETTINGS["fastv"]), pytest.raises(PruningError, match=r"model\.eval"):
            model(**inputs_of("llava"))
    finally:
        layers.eval()


@pytest.mark.parametrize("name", ["llava"])
def test_a_call_inside_generate_is_a_call_of_its_own(name: str) -> None:
    model, inputs, seen, calls = shared_model(name), inputs_of(name), [], count()
    with prune(model, **SETTINGS["pyramiddrop"]), torch.no_grad():
        text = {key: inputs[key][1:2, -6:] for key in ("input_ids", "attention_mask")}
        alone, shown = model(**text).logits, model(**inputs).logits
        wanted = model.generate(**inputs, **GREEDY)

        def nested(ids: Any, scores: Any, **kwargs: Any) -> Any:
            next(calls)
            seen.append((model(**text).logits, model(**inputs).logits))
            return torch.zeros(len(ids), dtype=torch.bool)

        found = model.generate(**inputs, **GREEDY, stopping_criteria=[nested])
    assert next(calls) == STEPS
    assert all(torch.equal(one, alone) and torch.equal(other, shown) for one, other in seen)
    assert torch.equal(found.sequences, wanted.sequences)
    assert error(found.logits, wanted.logits) <= 1e-6


@pytest.mark.parametrize("copied", [False, True])
def test_a_cache_is_read_right_after_its_block(copied: bool) -> None:
    """The model keeps its hooks as long as the cache lives, and no longer."""
    model, inputs = tiny("llava").build(), inputs_of("llava", ROWS[:1])
    said = torch.tensor([[7, 8, 9]])
    with torch.no_grad(), prune(model, **SETTINGS["pyramiddrop"]):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        inside = model(input_ids=said, past_key_values=caches[0], use_cache=True).logits
    if copied:
        caches = [copy.deepcopy(cache) for cache in caches]
    with torch.no_grad():
        outside = model(input_ids=said, past_key_values=caches[1], use_cache=True).logits
    assert torch.equal(inside, outside)
    assert "generate" in vars(model)
    del caches
    gc.collect()
    assert "generate" not in vars(model) and not model._forward_pre_hooks


@pytest.mark.parametrize("setting", ["fastv", "zoo+pyramiddrop"])
def test_padding_without_a_mask_is_that_of_the_stock_model(setting: str) -> None:
    """`generate` infers the mask from padding tokens."""
    inputs = dict(inputs_of("llava"))
    assert (inputs["attention_mask"] == 0).any()
    padding = int(inputs["input_ids"][inputs["attention_mask"] == 0].unique())
    assert torch.equal(inputs["input_ids"] != padding, inputs["attention_mask"].bool())
    _, given = generated("llava", setting, inputs, pad_token_id=padding)
    del inputs["attention_mask"]
    _, inferred = generated("llava", setting, inputs, pad_token_id=padding)
    assert torch.equal(given.sequences, inferred.sequences)
    assert all(torch.equal(*pair) for pair in zip(given.logits, inferred.logits, strict=True))
