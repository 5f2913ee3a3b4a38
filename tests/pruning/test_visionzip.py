"""VisionZip equals stored runs of the official code, and its published split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pruning_inputs import read_visual
from safetensors.torch import load_file
from sheet_vectors import ATTENTION, TOKENS
from torch import nn

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, PruningError, VisualTokens, prune, prune_visual_tokens

GOLDENS = Path(__file__).parents[1] / "goldens"


def load(name: str):
    folder = GOLDENS / "pruners" / "visionzip" / name
    return (
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )


@pytest.mark.parametrize("name", ["stub_n576", "stub_n64_b2"])
def test_equals_the_official_functions(name: str, record_error) -> None:
    about, inputs, outputs = load(name)
    hidden = inputs["hidden_states"]
    tiles, side = hidden.shape[0], round((hidden.shape[1] - 1) ** 0.5)
    visual = VisualTokens(
        hidden[:, 1:],
        hidden[:, 1:].clone(),
        nn.Identity(),
        torch.arange(tiles),
        (side, side),
        extras={
            "cls_attention": list(inputs["cls_attention_rows"].sum(dim=1)[:, 1:]),
            "encoder_keys": list(inputs["metric"][:, 1:]),
            "cls_feature": list(hidden[:, 0]),
        },
    )
    for run in about["runs"]:
        few, key = run["contextual"], f"dom{run['dominant_patches']}_ctx{run['contextual']}"
        config = PruningConfig.of("visionzip", keep_tokens=run["tokens_out"], contextual=few)
        out = prune_visual_tokens(visual, config)
        error = float((out.projected - outputs[f"{key}__tokens"]).abs().max())
        record_error("visionzip functions: tokens", error)
        assert error < 1e-4
        for tile in range(tiles):
            dominant = outputs[f"{key}__all_indices"][tile, 1:].sort().values - 1
            sources = out.sources[tile]
            assert not sources[0].any()
            assert sources[1:-few].nonzero()[:, 1].tolist() == dominant.tolist()
            targets = (outputs[f"{key}__contextual_target_positions"][tile] - 1).tolist()
            free = set(range(side * side)) - set(dominant.tolist())
            others = sorted(free - set(targets))
            want = [{target} for target in targets]
            for other, cluster in zip(
                others, outputs[f"{key}__assignment"][tile].tolist(), strict=True
            ):
                want[cluster].add(other)
            assert [set(row.nonzero().flatten().tolist()) for row in sources[-few:]] == want


@pytest.mark.parametrize("name", ["tower_v15", "tower_v16_anyres"])
def test_equals_the_official_run(name: str, record_error) -> None:
    about, inputs, outputs = load(name)
    model = load_pretrained_model(str(GOLDENS / "llava" / about["checkpoint"]), device="cpu")[1]
    images = [Image.open(GOLDENS / "llava" / file).convert("RGB") for file in about["images"]]
    if name == "tower_v16_anyres":
        # The official code neither cuts padding away nor inserts newlines.
        model.config.mm_next_protocol = "fixed2880"
    pixels = process_images(images, model.get_vision_tower().image_processor, model.config)
    sizes = [image.size for image in images]
    for run in about["runs"]:
        key = f"dom{run['dominant_patches']}_ctx{run['contextual']}"
        budget = run["tokens_per_view"] * (5 if name == "tower_v16_anyres" else 1)
        config = PruningConfig.of("visionzip", keep_tokens=budget, contextual=run["contextual"])
        with torch.no_grad(), prune(model, config):
            visual = model.encode_visual_tokens(pixels, sizes)
            embeds = model.prepare_inputs_labels_for_multimodal(
                inputs["input_ids"], None, None, None, None, pixels, sizes
            )[4]
        attention_error = (
            torch.stack(visual.extras["cls_attention"]) - outputs["cls_attention_sum"]
        ).abs()
        record_error("visionzip tower: class attention", float(attention_error.max()))
        assert float(attention_error.max()) < 1e-5
        error = float((embeds - outputs[f"{key}__inputs_embeds"]).abs().max())
        record_error("visionzip tower: inputs_embeds", error)
        assert error < 1e-4


def small(contextual: int | None, keep: int, **options):
    visual = VisualTokens(
        TOKENS[None],
        TOKENS[None].clone(),
        nn.Identity(),
        torch.zeros(1, dtype=torch.long),
        (6, 6),
        extras={
            "cls_attention": [ATTENTION],
            "encoder_keys": [TOKENS],
            "cls_feature": [torch.ones(8, dtype=torch.float64)],
        },
    )
    if contextual is not None:
        options["contextual"] = contextual
    return prune_visual_tokens(visual, PruningConfig.of("visionzip", keep_tokens=keep, **options))


def test_equals_the_reference_vector() -> None:
    out = small(3, 10)
    assert out.projected[0, 0].tolist() == [1.0] * 8
    assert out.sources[0, 1:7].nonzero()[:, 1].tolist() == [1, 7, 12, 18, 24, 35]
    assert (out.sources[0, 7:].sum(dim=1) - 1).tolist() == [17, 6, 4]
    want = [[1.4752, 1.8753, 2.5398], [1.5828, 0.2277, 0.1765], [-1.5165, -0.7203, -1.0590]]
    torch.testing.assert_close(
        out.projected[0, 7:, :3], torch.tensor(want, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_mean_is_the_mean_of_target_and_assigned() -> None:
    out = small(3, 10, ctx_merge="mean")
    for row in range(7, 10):
        members = TOKENS[out.sources[0, row]]
        torch.testing.assert_close(out.projected[0, row], members.mean(dim=0))


@pytest.mark.parametrize(
    ("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5), (7, 1), (6, 0), (2, 0)]
)
def test_published_split(keep: int, contextual: int) -> None:
    visual = read_visual(1, grid=(24, 24))
    out = prune_visual_tokens(visual, PruningConfig("visionzip", keep_tokens=keep))
    sizes = out.sources[0].sum(dim=1).tolist()
    assert sizes[: keep - contextual] == [0] + [1] * (keep - contextual - 1)
    assert sum(sizes) == (576 if contextual else keep - 1)
    assert out.embeddings(0).shape[0] == keep


def test_one_token_is_the_class_token() -> None:
    visual = read_visual(1)
    out = prune_visual_tokens(visual, PruningConfig("visionzip", keep_tokens=1))
    torch.testing.assert_close(
        out.embeddings(0)[0], visual.projector(visual.extras["cls_feature"][0])
    )


def test_an_unaffordable_number_of_contextual_tokens_is_refused() -> None:
    with pytest.raises(PruningError, match="contextual=3 or less"):
        small(4, 4)
    with pytest.raises(PruningError, match="ctx_merge must be one of sum, mean"):
        small(3, 10, ctx_merge="median")


def test_missing_readings_are_named() -> None:
    visual = replace(read_visual(1), extras={})
    with pytest.raises(PruningError, match="cls_attention"):
        prune_visual_tokens(visual, PruningConfig("visionzip", keep_tokens=9))
