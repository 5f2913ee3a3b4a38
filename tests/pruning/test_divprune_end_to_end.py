"""DivPrune inside a model: merged inputs and logits of the official code on the tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, prune

GOLDENS = Path(__file__).parents[1] / "goldens"
FOLDER = GOLDENS / "pruners" / "divprune" / "e2e_v15"


def test_equals_the_official_run(record_error) -> None:
    inputs = load_file(FOLDER / "inputs.safetensors")
    outputs = load_file(FOLDER / "outputs.safetensors")
    checkpoint = GOLDENS / "llava" / "checkpoints" / "llava15-tiny"
    model = load_pretrained_model(str(checkpoint), device="cpu")[1]
    image = Image.open(GOLDENS / "llava" / "images" / "std43.png").convert("RGB")
    pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
    with torch.no_grad(), prune(model, PruningConfig("divprune", keep_tokens=64)):
        visual = model.prune_visual_tokens(model.encode_visual_tokens(pixels, [image.size]))
        _, positions, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"], None, inputs["attention_mask"].bool(), None, None, pixels
        )
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(visual.kept[0], outputs["picked_in_order"].sort().values)
    error = float((embeds - outputs["inputs_embeds"]).abs().max())
    record_error("divprune end to end: inputs_embeds", error)
    assert error < 1e-4
    error = float((logits[:, -4:] - outputs["last_logits"]).abs().max())
    record_error("divprune end to end: last logits", error)
    assert error < 1e-4
