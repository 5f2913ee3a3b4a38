"""One suite over every registered family: offloading, precision, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from family_checks import GREEDY, NAMES, ROWS, error, inputs_of, shared_model, tiny
from torch import nn

from llava.model.multimodal_encoder import clip_text
from llava.pruning import PruningError, prune
from llava.pruning.lookup import FAMILIES
from llava.utils import UserInputError

each_family = pytest.mark.parametrize("name", NAMES)


def kept(run: Any) -> list[list[int]]:
    return [run.tokens.sequence(i).place.tolist() for i in range(run.tokens.num_images)]


def offloaded(how: str, model: Any, folder: Path) -> None:
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        disk_offload(model, os.fspath(folder), execution_device=torch.device("cpu"))
    else:
        parts = {"lm_head": "cpu"} | {f"model.{n}": "disk" for n, _ in model.model.named_children()}
        own = [n for n, _ in model.model.named_parameters(recurse=False)]
        parts |= {f"model.{n}": "cpu" for n in own}
        dispatch_model(model, parts, main_device="cpu", offload_dir=os.fspath(folder))


@each_family
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_models_keep_the_same_tokens(name: str, how: str, tmp_path: Path) -> None:
    if name == "idefics3":
        pytest.skip("transformers' Idefics3 sends embeddings to where its first weights lie")
    stock, model, inputs = shared_model(name), tiny(name).build(), inputs_of(name)
    offloaded(how, model, tmp_path)
    try:
        model.generate(**inputs, **GREEDY)
    except (RuntimeError, NotImplementedError) as failure:  # it reads a weight without a module
        pytest.skip(f"transformers' class does not run so: {str(failure)[:40]}")
    assert next(FAMILIES.get(name)().projector(model).parameters()).device.type == "meta"
    for method in ("zoo-exact", "zoo"):
        with prune(stock, method, keep_ratio=0.4) as run:
            wanted = stock.generate(**inputs, **GREEDY)
        with prune(model, method, keep_ratio=0.4) as own:
            found = model.generate(**inputs, **GREEDY)
        assert kept(own) == kept(run)
        assert error(found.logits, wanted.logits) <= 1e-6
    assert next(FAMILIES.get(name)().projector(model).parameters()).device.type == "meta"


@each_family
def test_precision_of_the_caller(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "zoo-exact", keep_ratio=0.4) as run:
        model(**inputs)
        wanted = kept(run)
        with torch.inference_mode():
            model(**inputs)
        assert kept(run) == wanted
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(**inputs).logits.isfinite().all()
        assert list(map(len, kept(run))) == list(map(len, wanted))
    half = tiny(name).build().to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    stock = half.generate(**inputs, **GREEDY)
    with prune(half, "zoo-exact", keep_ratio=1.0):
        assert torch.equal(half.generate(**inputs, **GREEDY).sequences, stock.sequences)
    with prune(half, "zoo-exact", keep_ratio=0.4) as run:
        found = half.generate(**inputs, **GREEDY)
    assert list(map(len, kept(run))) == list(map(len, wanted))
    assert all(step.isfinite().all() for step in found.logits)


def refused(model: Any, inputs: dict[str, Any], method: str = "divprune") -> str:
    """Return the one line that a call is refused with, before the language model runs."""
    ran = []
    language = FAMILIES.get(
        next(n for n, f in FAMILIES.entries().items() if type(model).__name__ in f.classes)
    )().language_model(model)
    handle = language.register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with pytest.raises(UserInputError) as caught, prune(model, method, keep_ratio=0.4):
            model(**inputs)
    finally:
        handle.remove()
    assert not ran and "\n" not in str(caught.value)
    return str(caught.value)


@each_family
def test_wrong_calls_are_refused_in_one_line(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    without = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert "pass input_ids" in refused(model, {**without, "inputs_embeds": embeds})
    ids = inputs["input_ids"].clone()
    ids[
        0, torch.isin(ids[0], torch.tensor(FAMILIES.get(name)().placeholders(model))).nonzero()[0]
    ] = 9
    message = refused(model, {**inputs, "input_ids": ids})
    assert "placeholders" in message and "call of the" in message
    assert "question" in refused(model, inputs, "mmtok")
    mask = inputs["attention_mask"][:, None, None].float()
    assert "like input_ids" in refused(model, {**inputs, "attention_mask": mask})
    pixels = {key: value for key, value in inputs.items() if "pixel" not in key}
    assert "mm_encoder_outputs" in refused(model, {**pixels, "mm_encoder_outputs": {"image": 1}})


@each_family
def test_videos_are_pruned_or_refused(name: str) -> None:
    if "pixel_values_videos" in FAMILIES.get(name).pixels:
        pytest.skip("this family takes videos")
    videos = {**inputs_of(name), "pixel_values_videos": torch.zeros(1, 3, 28, 28)}
    assert "videos of" in refused(shared_model(name), videos)


@each_family
def test_questions_need_a_text_tower_or_a_tokenizer(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    asked = {**inputs, "questions": ["what is it?"] * len(ROWS)}
    assert "text_tokenizer" in refused(model, asked, "mmtok") or "text tower" in refused(
        model, asked, "mmtok"
    )


def test_models_of_unknown_classes_are_refused() -> None:
    with (
        pytest.raises(PruningError, match="LlavaForConditionalGeneration"),
        prune(nn.Linear(2, 2), "zoo", keep_tokens=4),
    ):
        pass


def cut(inputs: dict[str, Any], name: str, entries: slice) -> dict[str, Any]:
    return {**inputs, name: inputs[name][entries]}


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *[(name, "pixel_values") for name in ("llava_next", "llava_onevision")],
        *[(name, "image_sizes") for name in ("llava_next", "llava_onevision")],
        *[(name, "pixel_values") for name in NAMES if name.startswith("qwen")],
        *[(name, "image_grid_thw") for name in NAMES if name.startswith("qwen")],
    ],
)
def test_pixels_of_other_images_are_refused(name: str, argument: str) -> None:
    model, inputs = shared_model(name), inputs_of(name)
    with prune(model, "divprune", keep_ratio=0.5):
        for entries in (slice(0, -1), slice(1, None)):
            with pytest.raises(PruningError, match="make input_ids and pixels with one call"):
                model(**cut(inputs, argument, entries))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_images_of_too_few_tiles_are_refused(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, [[(56, 56)]])
    inputs["pixel_values"] = inputs["pixel_values"][:, :-1]
    with (
        prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(PruningError, match="asks for 5 tiles, but pixel_values has 4"),
    ):
        model(**inputs)


def test_a_tower_without_a_name_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny("llava").build(), []
    monkeypatch.setattr(clip_text, "find_file", lambda source, name: asked.append(source))
    with prune(model, "cdpruner", keep_tokens=4, relevance="clip"):
        with pytest.raises(PruningError, match=r"set model.config.vision_config._name_or_path"):
            model(**inputs_of("llava"), questions=["a", "b", "c"])
        assert not asked
        model.config.vision_config._name_or_path = "somewhere/clip"
        with pytest.raises(PruningError, match="it is 'somewhere/clip'"):
            model(**inputs_of("llava"), questions=["a", "b", "c"])
    assert {*asked} == {"somewhere/clip"}
