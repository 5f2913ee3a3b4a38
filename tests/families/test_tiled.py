"""Families of several tiles an image: how tiles become tokens, what is read inside their towers."""

from __future__ import annotations

import copy
from typing import Any

import matrix
import pytest
import torch
from family_checks import (
    GREEDY,
    NAMES,
    STEPS,
    Shortened,
    error,
    inputs_of,
    shared_model,
    tiny,
)
from PIL import Image
from torch import Tensor, nn

from llava.families.idefics import Idefics3
from llava.families.towers import pool_readings
from llava.model.call_context import asking
from llava.pruning import PruningError, prune
from llava.pruning.importance.projectors import linear_matrix, normed_merger, two_layer
from llava.pruning.layout import NEWLINE
from llava.pruning.lookup import FAMILIES
from llava.pruning.tokens import VisualTokens

# Some of these have many tiles, and more than OneVision reads as they are.
LARGE: list[list[tuple[int, int]]] = [[(84, 84)], [(60, 110), (30, 30)], [], [(150, 50)]]
TILED = ["llava_onevision", "internvl", "idefics3", "smolvlm"]
SIGLIP = ["gemma3", "paligemma"]


def encoded(name: str, model: Any, rows: Any = LARGE, needs: Any = ()) -> VisualTokens:
    family, inputs = FAMILIES.get(name)(), inputs_of(name, rows)
    given = {key: inputs.get(key) for key in family.pixels}
    with torch.no_grad(), prune(model):  # the hooks are there, nothing is pruned
        visual: VisualTokens = family.encode(model, given, inputs["input_ids"], set(needs))
    return visual


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_many_tiles_decode_as_an_uncached_reference(name: str, positions: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, LARGE)
    length = inputs["input_ids"].shape[1]
    with prune(model, "divprune", keep_ratio=0.3, positions=positions) as run:
        found = model.generate(**inputs, **GREEDY)
    assert int(run.tokens.image_index.bincount().max()) > 2
    short = Shortened(FAMILIES.get(name)(), model, inputs, run.tokens)
    for row in range(len(LARGE)):
        tokens, logits = short.greedy(row, STEPS)
        assert found.sequences[row, length:].tolist() == tokens
        assert error([step[row] for step in found.logits], logits) <= 1e-5


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm", *SIGLIP])
def test_tokens_are_projected_features(name: str) -> None:
    visual = encoded(name, shared_model(name))
    with torch.no_grad():
        assert torch.allclose(visual.projector(visual.features), visual.projected, atol=1e-5)


def test_closed_forms_know_the_projectors() -> None:
    for name, known in {
        "llava_onevision": two_layer,
        "internvl": normed_merger,
        "idefics3": lambda projector: linear_matrix(projector, torch.float32),
        "paligemma": lambda projector: linear_matrix(projector, torch.float32),
    }.items():
        assert known(encoded(name, shared_model(name)).projector) is not None, name


def test_interpolated_features_and_tokens_belong_together() -> None:
    model = copy.deepcopy(shared_model("llava_onevision"))
    model.model.multi_modal_projector.act = nn.Identity()  # then projecting and mixing commute
    visual = encoded("llava_onevision", model, needs=["encoder_keys", "image_digest"])
    sizes = [layout.crops for layout in visual.layouts or ()]
    assert (3, 3) not in sizes and (2, 2) in sizes, "nothing was interpolated"
    valid = visual.valid_mask()
    with torch.no_grad():
        projected = visual.projector(visual.features)
    assert torch.allclose(projected[valid], visual.projected[valid], atol=1e-5)
    assert not visual.projected[~valid].any()
    assert visual.blank is not None and not visual.blank.any()
    tiles = len(visual.projected)
    assert len(visual.extras["encoder_keys"]) == len(set(visual.extras["image_digest"])) == tiles


def test_padding_of_single_tiles_is_known() -> None:
    visual = encoded("llava_onevision", shared_model("llava_onevision"), [[(28, 14), (28, 28)]])
    assert visual.blank is not None
    blank = visual.blank.view(2, 4, 4)
    assert blank[0].all(dim=0).tolist() == [True, False, False, True] and not blank[1].any()


def test_boxes_of_interpolated_tokens_cover_the_image() -> None:
    visual = encoded("llava_onevision", shared_model("llava_onevision"))
    for image, (height, width) in enumerate(size for row in LARGE for size in row):
        layout = (visual.layouts or ())[image]
        boxes = [box for box in visual.boxes(image)[layout.patches :] if box is not None]
        if not boxes:
            continue
        cell = max(boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1])
        wanted = [0, 0, width, height]
        edges = [min(b[0] for b in boxes), min(b[1] for b in boxes)]
        edges += [max(b[2] for b in boxes), max(b[3] for b in boxes)]
        assert all(abs(a - b) <= cell for a, b in zip(edges, wanted, strict=True))
        assert (layout.sequence == NEWLINE).sum() == layout.newline_rows[0]


def attention_of(tower: Any, layers: Any, pixels: Tensor) -> Tensor:
    """Return the attention [T, heads, S, S] of the last block, as the tower computes it itself."""
    seen: list[Tensor] = []
    module = layers[-1].self_attn if hasattr(layers[-1], "self_attn") else layers[-1].attention
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        tower(pixels)
    handle.remove()
    return seen[0]


def test_internvl_reads_the_attention_of_its_class_token() -> None:
    model = tiny("internvl").build()
    visual = encoded("internvl", model, needs=["cls_attention", "cls_feature", "encoder_keys"])
    tower = model.model.vision_tower
    pixels = inputs_of("internvl", LARGE)["pixel_values"]
    rows = attention_of(tower, tower.encoder.layer, pixels).sum(dim=1)[:, 0, 1:]
    squares = rows.view(-1, 4, 2, 4, 2).sum(dim=(2, 4)).flatten(1)  # 8 x 8 patches, 2 x 2 a token
    assert torch.allclose(torch.stack(visual.extras["cls_attention"]), squares, atol=1e-5)
    with torch.no_grad():
        class_token = tower(pixels).last_hidden_state[:, 0]
    found = torch.stack(visual.extras["cls_feature"])
    assert torch.allclose(found, class_token.repeat(1, 4), atol=1e-4)


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip_attention_is_summed_over_what_a_token_joins(name: str) -> None:
    model = tiny(name).build()
    visual = encoded(name, model, needs=["received_attention"])
    tower = model.model.vision_tower
    pixels = inputs_of(name, LARGE)["pixel_values"]
    received = attention_of(tower, tower.encoder.layers, pixels).mean(dim=2).sum(dim=1)
    edge = 2 if name == "gemma3" else 1
    squares = received.view(-1, 4, edge, 4, edge).sum(dim=(2, 4)).flatten(1)
    assert torch.allclose(torch.stack(visual.extras["received_attention"]), squares, atol=1e-5)


def test_keys_are_the_mean_of_what_a_token_joins() -> None:
    keys, groups = torch.randn(4, 3), torch.tensor([[0, 3], [1, 2]])
    pooled = pool_readings({"encoder_keys": [keys], "next_keys": [keys]}, groups)
    wanted = torch.stack([(keys[0] + keys[3]) / 2, (keys[1] + keys[2]) / 2])
    assert all(torch.allclose(tiles[0], wanted) for tiles in pooled.values())


@pytest.mark.parametrize("name", [*TILED, *SIGLIP])
def test_readings_after_the_last_block_are_refused_before_it_runs(name: str) -> None:
    model = shared_model(name)
    ran: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    block = FAMILIES.get(name)().blocks(model)[0].register_forward_hook(lambda *_: ran.append(1))
    with prune(model, "prumerge", keep_ratio=0.5), pytest.raises(PruningError, match="block after"):
        model(**inputs_of(name))
    handle.remove()
    block.remove()
    assert not ran


def test_idefics_counts_the_tiles_of_images_by_their_names() -> None:
    model, inputs = shared_model("idefics3"), inputs_of("idefics3", LARGE)
    given = {name: inputs[name] for name in Idefics3.pixels}
    sizes = [size for row in LARGE for size in row]
    wanted = [tiny("idefics3").tiles(size) for size in sizes]
    assert Idefics3().tile_counts(model, given, inputs["input_ids"]) == wanted and max(wanted) > 2


def test_idefics_refuses_readings_of_padded_images() -> None:
    model, inputs = shared_model("idefics3"), inputs_of("idefics3", [[(30, 30)]])
    mask = inputs["pixel_attention_mask"].clone()
    mask[..., -14:] = 0
    with prune(model, "fopru", keep_ratio=0.5):
        model(**inputs)
        with pytest.raises(PruningError, match="pixel_attention_mask"):
            model(**{**inputs, "pixel_attention_mask": mask})
    with prune(model, "divprune", keep_ratio=0.5):
        model(**{**inputs, "pixel_attention_mask": mask})


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", *SIGLIP])
def test_families_whose_prompts_only_processors_write_say_so(name: str) -> None:
    with pytest.raises(PruningError, match="processor_output"):
        FAMILIES.get(name)().count(shared_model(name), inputs_of(name, [[(30, 30)]]))


def video_prompt(rows: list[int]) -> dict[str, Any]:
    """Return inputs of OneVision: rows with videos of three frames (1) or one image (0) each."""
    numbers = torch.Generator().manual_seed(3)
    videos, size = sum(rows), (30, 30)
    image = inputs_of("llava_onevision", [[size]])
    count = int((image["input_ids"] == 150).sum())
    ids = [[5, 6, *([151] * 13 if video else [150] * count), 7, 8, 9] for video in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    made = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    if videos:
        made["pixel_values_videos"] = torch.randn(videos, 3, 3, 28, 28, generator=numbers)
    if videos < len(rows):
        made |= {key: image[key] for key in ("pixel_values", "image_sizes")}
        made["batch_num_images"] = torch.tensor([1 - video for video in rows])
    return made


def test_frames_of_onevision_are_pruned_one_by_one() -> None:
    model, inputs = shared_model("llava_onevision"), video_prompt([1])
    stock = model(**inputs).logits
    with prune(model, "divprune", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, stock)
    with prune(model, "divprune", keep_ratio=0.5) as run, torch.no_grad():
        found = model(**inputs).logits[0, -1]
    assert run.trace.tokens_before == [4, 4, 5] and run.trace.tokens_after == [2, 2, 2]
    places = [run.tokens.sequence(frame).place + 4 * frame for frame in range(3)]
    ids = inputs["input_ids"][0]
    columns = torch.cat(
        [torch.arange(2), torch.cat(places) + 2, torch.arange(len(ids) - 3, len(ids))]
    )
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        frames = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        embeds[2:14] = frames.pooler_output[0, :12]
        short = embeds[columns][None]
        hidden = model.model.language_model(inputs_embeds=short, use_cache=False).last_hidden_state
        assert error([found], [model.lm_head(hidden[0, -1])]) <= 1e-5


def test_videos_and_images_of_onevision_share_a_batch() -> None:
    model = shared_model("llava_onevision")
    with prune(model, "fopru", keep_ratio=0.5):
        both = model(**video_prompt([1, 0])).logits[:, -1]
        for row, kind in enumerate([1, 0]):
            assert error([both[row]], [model(**video_prompt([kind])).logits[0, -1]]) <= 1e-5


def test_interpolated_frames_and_their_features_belong_together() -> None:
    model = copy.deepcopy(shared_model("llava_onevision"))
    model.model.multi_modal_projector.act = nn.Identity()
    family, inputs = FAMILIES.get("llava_onevision")(), video_prompt([1])
    given = {key: inputs.get(key) for key in family.pixels}
    with torch.no_grad(), prune(model):
        visual = family.encode(model, given, inputs["input_ids"], {"encoder_keys"})
        assert torch.allclose(visual.projector(visual.features), visual.projected, atol=1e-5)
    assert [tile.shape[0] for tile in visual.extras["encoder_keys"]] == [4, 4, 4]


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_an_image_is_treated_alike_beside_any_other(name: str) -> None:
    model, picture = matrix.build(name), Image.new("RGB", (28, 28), "white")
    drawn, labels = [], []
    for rows in ([[(28, 28)]], [[(28, 28), (112, 24)]]):
        with asking(["what is it?"]), prune(model, "mmtok", keep_ratio=0.5) as run:
            model(**inputs_of(name, rows))
        drawn.append(run.overlay(picture, 0).tobytes())
        labels.append(run.trace.method)
    assert drawn[0] == drawn[1] and labels[0] == labels[1] == "mmtok"
    with pytest.raises(PruningError, match="where its tiles lie"):
        run.overlay(picture, 1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llava"])
def test_processors_that_pad_no_square_leave_no_padding_unknown(name: str) -> None:
    visual = encoded(name, shared_model(name), [[(28, 28)]])
    groups = getattr(visual, "groups", (visual,))
    assert all(group.blank is not None and not group.blank.any() for group in groups)
