"""Turns that stand side by side are what each would be alone, however long images become."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_llava import make_item, make_llava, save_tower

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_tokenizer
from llava.train.data import Collator
from llava.train.merge import merge

TEXTS = ("What color?", "red", "How many stars?", "two", "Where is it?", "upper left")
NARROW, WIDE, SMALL = (30, 90), (64, 32), (40, 40)
# A tile has 16 patches.
SETTINGS: dict[str, dict[str, Any]] = {
    "all patches": {"image_aspect_ratio": "pad"},
    "pruned": {"mm_token_pruning": {"method": "divprune", "keep_tokens": 5}},
    "pruned, original positions": {
        "mm_token_pruning": {"method": "divprune", "keep_tokens": 5, "positions": "original"}
    },
    "merged": {"mm_token_pruning": {"method": "pool", "keep_tokens": 4}},
    "tiles": {"image_aspect_ratio": "anyres"},
    "pruned tiles": {
        "image_aspect_ratio": "anyres",
        "mm_token_pruning": {"method": "divprune", "keep_ratio": 0.2},
    },
    "padded on the left elsewhere": {"tokenizer_padding_side": "left"},
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tower(folder)
    return folder


@pytest.fixture
def model(tokenizer: Any, tower: Path) -> Any:
    return make_llava(tokenizer, tower)


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Any:
    return load_tokenizer(work / "init")


def item(model: Any, tokenizer: Any, texts: tuple[str, ...], *sizes: tuple[int, int]) -> dict:
    """What the dataset would give for a sample about random pictures of these sizes."""
    return make_item(model, tokenizer, texts, *sizes, turns=True)


@pytest.mark.parametrize("limit", [4096, 90], ids=["whole", "cut"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_a_turn_sees_the_images_and_itself(
    settings: dict[str, Any], limit: int, model: Any, tokenizer: Any
) -> None:
    """In a batch of rows with two images, one, and none, each turn is what it is alone."""
    model.config.update(settings)
    items = [
        item(model, tokenizer, TEXTS, NARROW, SMALL),
        item(model, tokenizer, TEXTS[2:4], WIDE),
        item(model, tokenizer, TEXTS[:2]),
    ]
    collate = Collator(tokenizer.pad_token_id, 4096)
    lengths = [int(merge(model, collate([one]))["labels"].shape[1]) for one in items]
    model.config.tokenizer_model_max_length = limit
    merged = merge(model, collate(items))
    longest = merged["labels"].shape[1]
    assert longest == min(limit, max(lengths))
    together = model(**merged).logits
    for row, (one, length) in enumerate(zip(items, lengths, strict=True)):
        marks = (one["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()
        text = len(one["input_ids"]) - (int(marks[-1]) + 1 if len(marks) else 0)
        turns = torch.zeros(length, dtype=torch.long)
        labels = torch.full((length,), IGNORE_INDEX)
        turns[length - text :], labels[length - text :] = (
            one[key][len(one["input_ids"]) - text :] for key in ("turns", "labels")
        )
        turns, labels = turns[:longest], labels[:longest]
        assert merged["labels"][row, : len(labels)].tolist() == labels.tolist()
        assert (merged["labels"][row, len(labels) :] == IGNORE_INDEX).all()
        given = merged["position_ids"]
        places = torch.arange(longest) if given is None else given[row]
        for number in range(1, int(turns.max()) + 1):
            kept = ((turns == 0) | (turns == number)).nonzero()[:, 0]
            alone = model(
                inputs_embeds=merged["inputs_embeds"][row, kept][None],
                position_ids=places[kept][None],
            ).logits[0]
            assert torch.allclose(together[row, kept], alone, atol=1e-4)


def test_a_row_is_merged_alike_whatever_stands_beside_it(model: Any, tokenizer: Any) -> None:
    """Padding takes no room from images that are pruned to fit the length limit."""
    model.config.update(
        {
            "tokenizer_model_max_length": 60,
            "mm_token_pruning": {"method": "divprune", "keep_tokens": 15},
        }
    )
    shown = item(model, tokenizer, TEXTS[:2], SMALL)
    long = item(model, tokenizer, TEXTS)
    collate = Collator(tokenizer.pad_token_id, 60)
    alone, beside = merge(model, collate([shown])), merge(model, collate([shown, long]))
    length = alone["labels"].shape[1]
    assert torch.equal(beside["inputs_embeds"][0, :length], alone["inputs_embeds"][0])
    assert torch.equal(beside["labels"][0, :length], alone["labels"][0])


def test_an_image_whose_mark_is_cut_off_is_not_shown(model: Any, tokenizer: Any) -> None:
    two = item(model, tokenizer, TEXTS[:2], NARROW, WIDE)
    first = int((two["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()[0])
    batch = Collator(tokenizer.pad_token_id, first + 1)([two, item(model, tokenizer, TEXTS[:2])])
    assert len(batch["images"]) == 1 and batch["image_sizes"] == [NARROW]
    assert merge(model, batch)["labels"].shape[1] > first + 1
