"""What a third party writes: a family of a class that transformers does not have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_parts import IMAGE, TEXT, built, generator, prompts
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.families.family import Family
from llava.pruning import PruningError, prune
from llava.pruning.lookup import FAMILIES
from llava.pruning.tokens import VisualTokens

SIDE, CHANNELS = 4, 12


class ToyModel(LlamaPreTrainedModel):
    """Pictures [n, 16, 12] go through one layer and one projector into a language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tower = nn.ModuleList([nn.Linear(CHANNELS, 32)])
        self.connector = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64))
        self.language_model = LlamaModel(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, return_dict: bool = True) -> Any:
        tokens = self.connector(self.tower[0](pixel_values).tanh())
        return BaseModelOutputWithPooling(pooler_output=[*tokens])


class ToyForConditionalGeneration(LlamaForCausalLM, GenerationMixin):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def forward(
        self, input_ids=None, pixel_values=None, inputs_embeds=None, logits_to_keep=0, **more: Any
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                tokens = torch.cat(self.model.get_image_features(pixel_values).pooler_output)
                marks = (input_ids == IMAGE)[..., None]
                inputs_embeds = inputs_embeds.masked_scatter(marks, tokens)
        output = self.model.language_model(inputs_embeds=inputs_embeds, **more)
        output["logits"] = self.lm_head(output.last_hidden_state)
        return output


class Toy(Family):
    """The family: everything that `prune` has to be told."""

    name: ClassVar[str] = "toy"
    classes: ClassVar[tuple[str, ...]] = ("ToyForConditionalGeneration",)

    def projector(self, model: Any) -> nn.Module:
        connector: nn.Module = model.model.connector
        return connector

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        tower: Sequence[nn.Module] = model.model.tower
        return tower

    def placeholders(self, model: Any) -> list[int]:
        return [IMAGE]

    def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [SIDE * SIDE] * len(inputs["pixel_values"])

    def encode(
        self, model: Any, inputs: Mapping[str, Any], ids: Tensor, needs: Collection[str]
    ) -> VisualTokens:
        if not {*needs} <= {"features", "projector", "projector_hidden"}:
            raise PruningError("the toy's tower has no attention; use a method that reads none")
        _, features, projected = self.run_vision(model, inputs)
        image_index = torch.arange(len(projected))
        projector = self.projector(model)
        return VisualTokens(features, projected, projector, image_index, (SIDE, SIDE))


@pytest.fixture(scope="module")
def toy() -> Any:
    return built(ToyForConditionalGeneration, LlamaConfig(**TEXT))


@pytest.fixture
def inputs() -> dict[str, Any]:
    made: dict[str, Any] = prompts([[(1, 1)], [(1, 1), (1, 1)]], lambda _: [IMAGE] * 16, 0)
    made["pixel_values"] = torch.randn(3, 16, CHANNELS, generator=generator(0, 0))
    return made


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES.entries()
    monkeypatch.setattr(FAMILIES, "_entries", {**FAMILIES._entries})
    FAMILIES.register(Toy)


def test_a_class_of_ones_own_is_pruned(toy: Any, inputs: dict[str, Any], registered: None) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    stock = toy.generate(**inputs, **greedy)
    with prune(toy, "zoo-exact", keep_tokens=16):
        assert torch.equal(toy.generate(**inputs, **greedy), stock)
    with prune(toy, "zoo-exact", keep_tokens=5) as run:
        found = toy.generate(**inputs, **greedy)
        logits = toy(**inputs).logits
    assert run.trace.tokens_after == [5, 5, 5]
    assert found.shape == stock.shape and logits.shape[1] == inputs["input_ids"].shape[1] - 22
    assert found[:, -4].tolist() == logits[:, -1].argmax(-1).tolist()
    with pytest.raises(PruningError, match="no attention"), prune(toy, "fastervlm", keep_tokens=5):
        toy(**inputs)


def test_without_its_family_it_is_refused(toy: Any) -> None:
    with pytest.raises(PruningError, match="entry point"), prune(toy, "zoo-exact", keep_tokens=5):
        pass


def test_an_entry_point_is_enough(tmp_path: Path) -> None:
    package = tmp_path / "toy_family-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[llava.families]\ntoy = toy_family:Toy\n")
    (tmp_path / "toy_family.py").write_text(
        "from llava.families.family import Family\n"
        "class Toy(Family):\n    name = 'toy'\n    classes = ('ToyForConditionalGeneration',)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from llava.pruning.lookup import known_classes\n"
        "print('ToyForConditionalGeneration' in known_classes())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True", found.stderr


def test_pixels_of_another_name_are_seen(
    toy: Any, inputs: dict[str, Any], registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Renamed(Toy):
        name: ClassVar[str] = "toy"
        pixels: ClassVar[tuple[str, ...]] = ("images", "image_count")

        def lengths(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> list[int]:
            return [SIDE * SIDE] * len(inputs["images"])

        def run_vision(self, model: Any, inputs: Mapping[str, Any], capture: Any = None) -> Any:
            return Toy().run_vision(model, {"pixel_values": inputs["images"]}, capture)

    monkeypatch.setitem(FAMILIES._entries, "toy", Renamed)
    model = built(ToyForConditionalGeneration, LlamaConfig(**TEXT))
    given = {**inputs, "images": inputs["pixel_values"]}
    del given["pixel_values"]
    assert Renamed.shown == ("images",) and Toy.shown == ("pixel_values",)
    with prune(model, "zoo-exact", keep_tokens=5) as run:
        model(**given)
    assert run.trace is not None and run.trace.tokens_after == [5, 5, 5]


def test_pictures_that_are_no_pixels_are_refused() -> None:
    with pytest.raises(PruningError, match="name some of `pixels`"):
        type("Wrong", (Toy,), {"shown": ("images",)})
    with pytest.raises(PruningError, match="name some of `pixels`"):
        type("Empty", (Toy,), {"pixels": ()})


def test_a_class_has_one_family(registered: None) -> None:
    other = type("Other", (Toy,), {"name": "other"})
    with pytest.raises(PruningError, match="which family 'toy' of"):
        FAMILIES.register(other)
    assert "other" not in FAMILIES.entries()
    assert FAMILIES.register(Toy) is Toy
