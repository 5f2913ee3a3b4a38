"""Every recorded LLaVA-1.5 run is reproduced: merged inputs, logits, greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.constants import IGNORE_INDEX
from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM

GOLDENS = Path(__file__).parents[1] / "goldens" / "llava"
CASES = sorted(path.name for path in (GOLDENS / "cases").iterdir())
NAMES = ("position_ids", "attention_mask", "labels")
TOLERANCE = 1e-4


class Case:
    """One recorded run, its inputs prepared with our own code on ``model``."""

    def __init__(self, name: str, model: LlavaLlamaForCausalLM) -> None:
        folder = GOLDENS / "cases" / name
        self.about = json.loads((folder / "case.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        for key, value in self.about["config_overrides"].items():
            setattr(model.config, key, value)
        images = [Image.open(GOLDENS / file).convert("RGB") for file in self.about["images"]]
        processor = model.get_vision_tower().image_processor
        self.images = process_images(images, processor, model.config)
        self.sizes = [tuple(size) for size in self.about["image_sizes_wh"]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tiny: LlavaLlamaForCausalLM) -> Case:
    return Case(request.param, tiny)


def test_all_cases_are_here() -> None:
    assert len(CASES) == 8


def test_merged_inputs(case: Case, tiny: LlavaLlamaForCausalLM, record_error) -> None:
    given = [case.inputs.get(name) for name in NAMES]
    with torch.no_grad():
        ids, positions, mask, cache, embeds, labels = tiny.prepare_inputs_labels_for_multimodal(
            case.inputs["input_ids"], given[0], given[1], None, given[2], case.images, case.sizes
        )
    assert ids is None and cache is None
    outputs = case.outputs
    for name, value in zip(NAMES, (positions, mask, labels), strict=True):
        if name in case.about["returned_none"]:
            assert value is None
        else:
            wanted = outputs["out_labels" if name == "labels" else name]
            assert value.dtype == case.inputs[name].dtype
            assert torch.equal(value, wanted)
    if "inputs_embeds" in outputs:
        error = (embeds - outputs["inputs_embeds"]).abs().max().item()
    else:
        errors = (
            embeds[..., :8] - outputs["inputs_embeds_ch8"],
            embeds[:, outputs["inputs_embeds_at_pos"]] - outputs["inputs_embeds_at"],
            embeds.norm(dim=-1) - outputs["inputs_embeds_norm"],
        )
        error = max(e.abs().max().item() for e in errors)
    record_error("llava 1.5: inputs_embeds", error)
    assert error <= TOLERANCE


def test_logits(case: Case, tiny: LlavaLlamaForCausalLM, record_error) -> None:
    with torch.no_grad():
        output = tiny(**case.inputs, images=case.images, image_sizes=case.sizes)
    logits = output.logits
    for row in range(len(logits)):
        at = case.outputs[f"logits_pos_row{row}"]
        error = (logits[row, at] - case.outputs[f"logits_row{row}"]).abs().max().item()
        record_error("llava 1.5: logits", error)
        assert error <= TOLERANCE
    wanted = case.outputs["argmax"]
    top = logits.topk(2).values
    certain = (wanted >= 0) & (top[..., 0] - top[..., 1] > 1e-3)
    assert certain.any()
    assert torch.equal(logits.argmax(-1)[certain], wanted[certain])
    if "labels" in case.inputs and (case.outputs["out_labels"] != IGNORE_INDEX).any():
        error = abs(output.loss.item() / case.about["loss"] - 1)
        record_error("llava 1.5: loss (relative)", error)
        assert error <= 1e-5


@pytest.mark.parametrize("name", ["v15_single", "v15_batch2_left"])
def test_greedy_tokens(name: str, tiny: LlavaLlamaForCausalLM, record_error) -> None:
    case = Case(name, tiny)
    generation = case.about["generate"]
    output = tiny.generate(
        case.inputs["input_ids"],
        images=case.images,
        image_sizes=case.sizes,
        attention_mask=case.inputs["attention_mask"],
        output_scores=True,
        return_dict_in_generate=True,
        **generation["kwargs"],
    )
    assert output.sequences.tolist() == generation["new_tokens"]
    scores = torch.stack(output.scores, dim=1)
    error = (scores - case.outputs["generate_scores"]).abs().max().item()
    record_error("llava 1.5: generation scores", error)
    assert error <= TOLERANCE


def test_encoded_image(tiny: LlavaLlamaForCausalLM, record_error) -> None:
    case = Case("v15_single", tiny)
    with torch.no_grad():
        visual = tiny.encode_visual_tokens(case.images)
        encoded = tiny.encode_images(case.images)
    assert torch.equal(encoded, visual.projected)
    for group, value, wanted in (
        ("tower features", visual.features, "vision_tower_selected"),
        ("encode_images", encoded, "encode_images"),
    ):
        error = (value - case.outputs[wanted]).abs().max().item()
        record_error(f"llava 1.5: {group}", error)
        assert error <= TOLERANCE
