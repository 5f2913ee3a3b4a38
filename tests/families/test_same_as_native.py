"""LLaVA-1.5 and 1.6 as this package's class and as transformers': the same tokens and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import error, inputs_of, tiny
from tiny_parts import IMAGE
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.call_context import asking
from llava.pruning import PruningError, get_method, list_methods, prune

ROWS = {"llava": [[(28, 28), (28, 28)]], "llava_next": [[(56, 56), (40, 56)]]}
BUDGETS = {"llava": (4, 8, 11), "llava_next": (20, 36)}
LETTERS = "abcdefghijklmnopqrstuvwxyz?"
METHODS = [name for name in list_methods() if get_method(name).budgeted]


class Letters:
    """A tokenizer: a letter is an id."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def save_clip(folder: Path, vision: dict[str, Any]) -> None:
    """Save a complete CLIP of random weights with a tokenizer of letters."""
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    end = len(vocabulary) - 1
    marks = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=end + 1,
        max_position_embeddings=12,
        **marks,
    )
    own = CLIPVisionConfig(**vision).to_dict()
    config = CLIPConfig(text_config=text.to_dict(), vision_config=own, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="module", params=[*ROWS])
def pair(request: Any, tmp_path_factory: Any) -> tuple[str, Any, Any]:
    """Name of a family, its tiny model and the same weights in this package's class."""
    folder = tmp_path_factory.mktemp(request.param)
    stock = tiny(request.param).build()
    stock.save_pretrained(folder / "model")
    native = load_pretrained_model(str(folder / "model"), device="cpu")[1]
    save_clip(folder / "clip", tiny(request.param).VISION)
    stock.config.vision_config._name_or_path = str(folder / "clip")
    native.get_vision_tower().source = str(folder / "clip")
    for model in (stock, native):
        model.text_tokenizer = Letters()
    return request.param, stock, native


def native_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what this package's class takes: one mark for each image, tiles, (width, height)."""
    ids: list[int] = []
    for number in inputs["input_ids"][0].tolist():
        if number != IMAGE:
            ids.append(number)
        elif ids[-1] != IMAGE_TOKEN_INDEX:
            ids.append(IMAGE_TOKEN_INDEX)
    made: dict[str, Any] = {"input_ids": torch.tensor([ids]), "images": inputs["pixel_values"]}
    if "image_sizes" in inputs:
        sizes = inputs["image_sizes"].flip(-1).tolist()
        images = [image[image.abs().sum(dim=(1, 2, 3)) > 0] for image in inputs["pixel_values"]]
        made |= {"images": images, "image_sizes": sizes}
    return made


def outcome(model: Any, inputs: dict[str, Any], method: str, **settings: Any) -> Any:
    """Return what was kept and the logits, or what was refused."""
    try:
        with torch.no_grad(), asking(["what is it?"]), prune(model, method, **settings) as run:
            logits = model(**inputs).logits
    except PruningError as refusal:
        return str(refusal)
    places = [run.tokens.sequence(image).place for image in range(run.tokens.num_images)]
    return (
        logits,
        run.trace.method,
        run.trace.tokens_after,
        [None if place is None else place.tolist() for place in places],
    )


def test_logits_without_pruning_are_the_same(pair: Any) -> None:
    name, stock, native = pair
    inputs = inputs_of(name, ROWS[name])
    assert error([native(**native_inputs(inputs)).logits], [stock(**inputs).logits]) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_same_tokens(pair: Any, method: str) -> None:
    name, stock, native = pair
    inputs = inputs_of(name, ROWS[name])
    pruned = 0
    for budget in BUDGETS[name]:
        for positions in ("compact", "original"):
            settings = {"keep_tokens": budget, "positions": positions}
            if get_method(method).merges and positions == "original":
                continue
            found = outcome(stock, inputs, method, **settings)
            wanted = outcome(native, native_inputs(inputs), method, **settings)
            if isinstance(found, str) or isinstance(wanted, str):
                assert found == wanted
                continue
            assert found[1:] == wanted[1:]
            assert error([found[0]], [wanted[0]]) <= 1e-4
            pruned += 1
    assert pruned or method == "pool"  # which needs budgets that are rectangles


def test_cdpruner_reads_the_same_question(pair: Any) -> None:
    name, stock, native = pair
    inputs = inputs_of(name, ROWS[name])
    budget = BUDGETS[name][0]
    found = outcome(stock, inputs, "cdpruner", keep_tokens=budget, relevance="clip")
    wanted = outcome(
        native, native_inputs(inputs), "cdpruner", keep_tokens=budget, relevance="clip"
    )
    assert found[1:] == wanted[1:]
    assert found[3] != outcome(stock, inputs, "cdpruner", keep_tokens=budget, relevance="none")[3]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_text_models(kind: str) -> None:
    from tiny_parts import TEXT
    from transformers import Qwen2Config

    config = {"mistral": MistralConfig, "qwen2": Qwen2Config}[kind](**TEXT)
    assert not isinstance(config, LlamaConfig)
    model, inputs = tiny("llava").build(text=config), inputs_of("llava")
    stock = model(**inputs).logits
    with prune(model, "zoo-exact", keep_tokens=16):
        assert torch.equal(model(**inputs).logits, stock)
    with prune(model, "zoo-exact", keep_tokens=4) as run:
        logits = model(**inputs).logits
    assert run.trace.tokens_after == [4, 4, 4] and logits.shape[1] == stock.shape[1] - 24
