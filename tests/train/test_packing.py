"""Samples in one row are what each would be alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_llava import make_item, make_llava, save_tower
from torch import Tensor
from torch.nn.functional import cross_entropy

from llava.constants import IGNORE_INDEX
from llava.model.builder import load_tokenizer
from llava.train.data import Collator
from llava.train.merge import first_fit, merge, merging
from llava.utils import UserInputError

TEXTS = ("What color?", "red", "How many stars?", "two", "Where is it?", "upper left")
WIDE, SMALL, NARROW = (64, 32), (40, 40), (30, 90)
SETTINGS: dict[str, dict[str, Any]] = {
    "all patches": {},
    "tiles": {"image_aspect_ratio": "anyres"},
    "pruned, original positions": {
        "mm_token_pruning": {"method": "divprune", "keep_tokens": 5, "positions": "original"}
    },
    "cut": {"tokenizer_model_max_length": 90},
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tower(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Any:
    return load_tokenizer(work / "init")


@pytest.fixture
def model(tokenizer: Any, tower: Path) -> Any:
    return make_llava(tokenizer, tower, torch.float64)


def batch_of(model: Any, tokenizer: Any, *, turns: bool) -> dict:
    """One long sample and short ones, with and without images."""
    items = [
        make_item(model, tokenizer, TEXTS * 3, WIDE, NARROW, turns=turns),
        make_item(model, tokenizer, TEXTS[:2]),
        make_item(model, tokenizer, TEXTS[2:6], SMALL, turns=turns),
        make_item(model, tokenizer, TEXTS[4:6]),
    ]
    batch = Collator(tokenizer.pad_token_id, 4096)(items)
    images = batch["images"]
    batch["images"] = (
        [image.double() for image in images] if type(images) is list else (images.double())
    )
    return batch


def loss_and_gradients(model: Any, batch: dict[str, Any], packing: bool) -> tuple[Tensor, dict]:
    """Return the loss in float64, which transformers computes in float32, and its gradients."""
    merged = merge(model, batch, packing=packing)
    logits, labels = model(**merged).logits[:, :-1], merged["labels"][:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with merging(model, packing=packing):
        assert abs(model(**batch).loss - loss) < 1e-5
    return loss.detach(), found


@pytest.mark.parametrize("turns", [False, True], ids=["in turn", "side by side"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_packed_batch_is_the_padded_one(
    name: str, turns: bool, model: Any, tokenizer: Any
) -> None:
    model.config.update(SETTINGS[name])
    batch = batch_of(model, tokenizer, turns=turns)
    padded, packed = merge(model, batch), merge(model, batch, packing=True)
    assert len(packed["labels"]) < len(padded["labels"])
    assert packed["labels"].shape[1] <= padded["labels"].shape[1]
    assert (packed["labels"] != IGNORE_INDEX).sum() == (padded["labels"] != IGNORE_INDEX).sum()
    logits = []
    for merged in (padded, packed):
        learnt = merged["labels"][:, 1:] != IGNORE_INDEX
        logits.append(model(**merged).logits[:, :-1][learnt].detach())
    # The samples stand in another order.
    apart = (logits[0][:, None] - logits[1][None]).abs().amax(-1)
    assert (apart.amin(0) < 1e-9).all() and (apart.amin(1) < 1e-9).all()
    (loss, wanted), (other, found) = (loss_and_gradients(model, batch, p) for p in (False, True))
    assert abs(loss - other) < 1e-9
    assert wanted.keys() == found.keys() and any("mm_projector" in key for key in wanted)
    for key in wanted:
        assert torch.allclose(wanted[key], found[key], rtol=0, atol=1e-9), key


@torch.no_grad()
def test_a_sample_says_nothing_to_its_neighbours(model: Any, tokenizer: Any) -> None:
    """The words of one change; what stands before and behind it in its row stays as it was."""
    batch = batch_of(model, tokenizer, turns=True)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, 3:9] = batch["input_ids"][1, 2:8]
    merged = [merge(model, one, packing=True) for one in (batch, other)]
    assert torch.equal(merged[0]["attention_mask"], merged[1]["attention_mask"])
    changed = (merged[0]["inputs_embeds"] != merged[1]["inputs_embeds"]).any(-1)
    assert changed.any()
    row = int(changed.any(1).nonzero())
    # A sample in a row starts where a token sees nothing but itself.
    sees = merged[0]["attention_mask"][row, 0] == 0
    number = (sees.sum(1) == 1).cumsum(0)
    own = number == number[changed[row]][0]
    before, after = (model(**m).logits for m in merged)
    assert not torch.equal(before[row, own], after[row, own])
    assert torch.equal(before[row, ~own], after[row, ~own]) and (~own).any()
    others = [other for other in range(len(before)) if other != row]
    assert torch.equal(before[others], after[others])


def test_rows_are_no_longer_than_the_longest_sample() -> None:
    assert first_fit([3, 10, 7, 2, 8]) == [[1], [4, 3], [2, 0]]
    assert first_fit([4, 4, 4]) == [[0], [1], [2]]


def test_what_packing_does_not_help_stays_as_it_is(model: Any, tokenizer: Any) -> None:
    item = make_item(model, tokenizer, TEXTS[:2])
    batch = Collator(tokenizer.pad_token_id, 4096)([item, item])
    merged = merge(model, batch, packing=True)
    assert len(merged["labels"]) == 2 and merged["attention_mask"] is None


def test_attention_without_a_mask_of_its_own_is_refused(model: Any, tokenizer: Any) -> None:
    batch = batch_of(model, tokenizer, turns=True)
    model.config._attn_implementation = "flash_attention_2"
    fault = "--pack_samples needs attention .* 'flash_attention_2' takes none; load .* 'sdpa'"
    with pytest.raises(UserInputError, match=fault), merging(model, packing=True):
        pass
    with pytest.raises(UserInputError, match="--parallel_turns needs attention"):
        merge(model, batch)


def test_a_sliding_window_is_refused(model: Any, tokenizer: Any) -> None:
    model.config.sliding_window = 50
    with pytest.raises(UserInputError, match="longer than the model's sliding_window of 50"):
        merge(model, batch_of(model, tokenizer, turns=False), packing=True)
