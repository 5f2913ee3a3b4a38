"""DivPrune inside a model: merged inputs and logits of the official code on the tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, prune

GOLDENS = Path(__file__).parents[1] / "goldens"
SETTINGS = {
    "e2e_v15": {"keep_tokens": 64},
    # The official code lets the newlines of LLaVA-1.6 compete with the patches of all tiles.
    "e2e_v16": {"keep_tokens": 96, "allocation": "global", "newline": "select"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_official_run(name: str, record_error) -> None:
    folder = GOLDENS / "pruners" / "divprune" / name
    about = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    model = load_pretrained_model(str(GOLDENS / "llava" / about["checkpoint"]), device="cpu")[1]
    image = Image.open(GOLDENS / "llava" / about["images"][0]).convert("RGB")
    pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
    with torch.no_grad(), prune(model, PruningConfig("divprune", **SETTINGS[name])):
        visual = model.prune_visual_tokens(model.encode_visual_tokens(pixels, [image.size]))
        _, positions, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            *(inputs["input_ids"], None, inputs["attention_mask"].bool(), None, None),
            *(pixels, [image.size]),
        )
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(visual.sequence(0).place, outputs["picked_in_order"].sort().values)
    error = float((embeds - outputs["inputs_embeds"]).abs().max())
    record_error("divprune end to end: inputs_embeds", error)
    assert error < 1e-4
    error = float((logits[:, -4:] - outputs["last_logits"]).abs().max())
    record_error("divprune end to end: last logits", error)
    assert error < 1e-4
