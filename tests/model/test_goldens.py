"""Every recorded run of LLaVA-1.5 and 1.6 is reproduced: merged inputs, logits, greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded_pixels import skip_unless_reproducible
from safetensors.torch import load_file

from llava.constants import IGNORE_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "llava"
CASES = sorted(path.name for path in (GOLDENS / "cases").iterdir())
GENERATED = [
    *("v15_single", "v15_batch2_left"),
    *("v16_std43", "v16_square", "v16_wide", "v16_batch2_left"),
]
NAMES = ("position_ids", "attention_mask", "labels")
TOLERANCE = 1e-4


class Case:
    """One recorded run, its inputs prepared with our own code on `model`."""

    def __init__(self, name: str) -> None:
        folder = GOLDENS / "cases" / name
        self.about = json.loads((folder / "case.json").read_text())
        self.version = "llava 1.6" if name.startswith("v16") else "llava 1.5"
        skip_unless_reproducible(self.about["images"], in_tiles=self.version == "llava 1.6")
        checkpoint = str(GOLDENS / self.about["checkpoint"])
        self.model = model = load_pretrained_model(checkpoint, device="cpu")[1]
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        for key, value in self.about["config_overrides"].items():
            setattr(model.config, key, value)
        images = [Image.open(GOLDENS / file).convert("RGB") for file in self.about["images"]]
        processor = model.get_vision_tower().image_processor
        self.images = process_images(images, processor, model.config)
        self.sizes = [tuple(size) for size in self.about["image_sizes_wh"]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_all_cases_are_here() -> None:
    assert len(CASES) == 17


def test_merged_inputs(case: Case, record_error) -> None:
    given = [case.inputs.get(name) for name in NAMES]
    prepare = case.model.prepare_inputs_labels_for_multimodal
    with torch.no_grad():
        ids, positions, mask, cache, embeds, labels = prepare(
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
    record_error(f"{case.version}: inputs_embeds", error)
    assert error <= TOLERANCE


def test_logits(case: Case, record_error) -> None:
    with torch.no_grad():
        output = case.model(**case.inputs, images=case.images, image_sizes=case.sizes)
    logits = output.logits
    for row in range(len(logits)):
        at = case.outputs[f"logits_pos_row{row}"]
        error = (logits[row, at] - case.outputs[f"logits_row{row}"]).abs().max().item()
        record_error(f"{case.version}: logits", error)
        assert error <= TOLERANCE
    wanted = case.outputs["argmax"]
    top = logits.topk(2).values
    certain = (wanted >= 0) & (top[..., 0] - top[..., 1] > 1e-3)
    assert certain.any()
    assert torch.equal(logits.argmax(-1)[certain], wanted[certain])
    if "labels" in case.inputs and (case.outputs["out_labels"] != IGNORE_INDEX).any():
        error = abs(output.loss.item() / case.about["loss"] - 1)
        record_error(f"{case.version}: loss (relative)", error)
        assert error <= 1e-5


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_tokens(name: str, record_error) -> None:
    case = Case(name)
    generation = case.about["generate"]
    output = case.model.generate(
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
    record_error(f"{case.version}: generation scores", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["v15_single", "v16_tiny"])
def test_encoded_image(name: str, record_error) -> None:
    case = Case(name)
    with torch.no_grad():
        visual = case.model.encode_visual_tokens(case.images, case.sizes)
        encoded = case.model.encode_images(case.images.flatten(0, -4))
    assert torch.equal(encoded, visual.projected)
    compared = {"vision_tower_selected": visual.features, "encode_images": encoded}
    for wanted in compared.keys() & case.outputs.keys():
        error = (compared[wanted] - case.outputs[wanted]).abs().max().item()
        record_error(f"{case.version}: {wanted}", error)
        assert error <= TOLERANCE
    assert "encode_images" in case.outputs
