"""One suite over every registered family: decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import (
    ANSWER_TYPE,
    GREEDY,
    NAMES,
    ROWS,
    STEPS,
    TINY,
    Shortened,
    error,
    inputs_of,
    placeholders,
    shared_model,
)
from transformers import DynamicCache

from llava.pruning import PruningError, prune
from llava.pruning.lookup import FAMILIES

each_family = pytest.mark.parametrize("name", NAMES)
each_mode = pytest.mark.parametrize("positions", ["compact", "original"])


def family_of(name: str) -> Any:
    return FAMILIES.get(name)()


def test_every_family_has_a_tiny_model() -> None:
    assert {file.stem for file in TINY.glob("*.py")} >= set(NAMES)


@each_family
def test_images_change_what_a_tiny_model_says(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, [[(28, 28)]])
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    one, two = model.generate(**inputs, **GREEDY), model.generate(**other, **GREEDY)
    assert error(one.logits, two.logits) > 0.01
    alone = inputs_of(name, ROWS[2:], seed=2)["input_ids"]
    row = inputs_of(name)["input_ids"][2]
    assert row[row != 0].tolist() == alone[0].tolist(), "row i is made from seed + i"


@each_family
def test_a_budget_of_all_tokens_changes_nothing(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    stock, forward = model.generate(**inputs, **GREEDY), model(**inputs).logits
    for settings in ({"keep_ratio": 1.0}, {"keep_tokens": 5000, "scope": "prompt"}):
        with prune(model, "zoo-exact", **settings):
            found = model.generate(**inputs, **GREEDY)
            assert torch.equal(model(**inputs).logits, forward)
        assert torch.equal(found.sequences, stock.sequences)
        assert all(map(torch.equal, found.logits, stock.logits))


@each_family
@each_mode
def test_decoding_equals_an_uncached_reference(name: str, positions: str) -> None:
    model, family, inputs = shared_model(name), family_of(name), inputs_of(name)
    length = inputs["input_ids"].shape[1]
    with prune(model, "divprune", keep_ratio=0.4, positions=positions) as run:
        found = model.generate(**inputs, **GREEDY)
    short = Shortened(family, model, inputs, run.tokens)
    assert run.trace.tokens_after == [
        max(1, round(0.4 * count)) for count in run.trace.tokens_before
    ]
    assert torch.equal(found.sequences[:, :length], inputs["input_ids"])
    for row in range(len(ROWS)):
        tokens, logits = short.greedy(row, STEPS)
        assert found.sequences[row, length:].tolist() == tokens
        assert error([step[row] for step in found.logits], logits) <= 1e-5


def merging(name: str) -> str:
    """Return a method that makes new tokens and can prune the tiny model of a family."""
    for method in ("pool", "visionzip"):
        try:
            with prune(shared_model(name), method, keep_ratio=0.5):
                shared_model(name)(**inputs_of(name))
                return method
        except PruningError:
            continue
    raise AssertionError("no method merges tokens of this family")


@each_family
@pytest.mark.parametrize("kind", ["selects", "draws", "merges"])
def test_a_batch_equals_its_rows(name: str, kind: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    method = {"selects": "divprune", "draws": "random"}.get(kind) or merging(name)
    with prune(model, method, keep_ratio=0.5) as run:
        batch = model.generate(**inputs, **GREEDY)
        after = run.trace.tokens_after
        for row in range(len(ROWS)):
            alone = inputs_of(name, ROWS[row : row + 1], seed=row)
            found = model.generate(**alone, **GREEDY)
            if ROWS[row]:
                assert run.trace.tokens_after == after[: len(ROWS[row])]
                after = after[len(ROWS[row]) :]
            new = found.sequences[0, alone["input_ids"].shape[1] :]
            assert torch.equal(batch.sequences[row, -STEPS:], new)
            assert error([step[row] for step in batch.logits], [s[0] for s in found.logits]) <= 1e-5


@each_family
def test_images_of_a_prompt_share_a_budget(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.5) as run:
        model(**inputs)
    before = run.trace.tokens_before
    total = (before[0] + before[1]) // 2
    with prune(model, "divprune", keep_tokens=total, scope="prompt") as run:
        model(**inputs)
    first, second, alone = run.trace.tokens_after
    assert first + second == total and min(first, second) >= 1
    assert alone == min(total, before[2])


@each_family
@each_mode
def test_loss_is_that_of_the_short_sequence(name: str, positions: str) -> None:
    model, family, inputs = shared_model(name), family_of(name), inputs_of(name)
    ids = inputs["input_ids"]
    text = (inputs["attention_mask"] == 1) & ~placeholders(family, model, ids)
    text &= inputs["attention_mask"].cumsum(-1) > 1  # nothing comes before the first token
    labels = ids.masked_fill(~text, -100)
    with prune(model, "divprune", keep_ratio=0.4, positions=positions) as run:
        output = model(**inputs, labels=labels)
    short = Shortened(family, model, inputs, run.tokens)
    losses = []
    for row, columns in enumerate(short.columns):
        width = len(columns)
        logits = output.logits[row, -width:]
        wanted = labels[row, columns][1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none"))
        losses[-1] = losses[-1][wanted != -100]
        assert error([logits[-1]], [short.logits(row, [])]) <= 1e-5
    loss = float(torch.cat(losses).mean().detach())
    assert abs(float(output.loss.detach()) - loss) <= 1e-5 * loss
    weights = [p for p in family.projector(model).parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(output.loss, weights)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@each_family
@each_mode
def test_decoding_by_hand_with_a_cache(name: str, positions: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.4, positions=positions):
        wanted = model.generate(**inputs, **GREEDY).logits
        cache = DynamicCache(config=model.config.get_text_config())
        mask = inputs["attention_mask"]
        with torch.no_grad():
            output = model(**inputs, past_key_values=cache, use_cache=True)
            for step in range(1, STEPS):
                assert error([output.logits[:, -1]], [wanted[step - 1]]) <= 1e-5
                token = output.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                output = model(
                    input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True
                )
        assert error([output.logits[:, -1]], [wanted[-1]]) <= 1e-5


@each_family
@each_mode
def test_a_second_turn_goes_on_from_the_cache(name: str, positions: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    count = len(ROWS)
    said = torch.randint(3, 100, (count, 4), generator=torch.Generator().manual_seed(9))
    with prune(model, "divprune", keep_ratio=0.4, positions=positions):
        first = model.generate(**inputs, **GREEDY)
        whole = torch.cat([first.sequences, said], dim=1)
        more = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        more["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            added = whole.shape[1] - kinds.shape[1]
            more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, added))
        if "token_type_ids" in inputs:
            kinds = inputs["token_type_ids"]
            added = whole.shape[1] - kinds.shape[1]
            said_type = ANSWER_TYPE.get(name, 0)
            more["token_type_ids"] = torch.nn.functional.pad(kinds, (0, added), value=said_type)
        cached = model.generate(**more, past_key_values=first.past_key_values, **GREEDY)
        again = model.generate(**{**inputs, **more}, **GREEDY)
    assert torch.equal(cached.sequences, again.sequences)
    assert error(cached.logits, again.logits) <= 1e-5
