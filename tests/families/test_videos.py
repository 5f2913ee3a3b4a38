"""Videos and images in one prompt, against a reference without a cache, positions included."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from family_checks import NAMES, error, inputs_of, shared_model
from torch import Tensor

from llava.pruning import prune

QWEN = [name for name in NAMES if name.startswith("qwen")]
# Only these have the times of frames in their positions; the others have them in the prompt.
JOINT = ("qwen2_vl", "qwen2_5_vl")
FRAMES, GRID, PICTURE = 3, (4, 6), (4, 2)
IMAGE, VIDEO = 150, 151


def call_of(name: str) -> dict[str, Any]:
    """Return a prompt with a video of 3 frames of 4 x 6 tokens, and an image of 4 x 2."""
    each = GRID[0] * GRID[1]
    if name in JOINT:
        video = [152, *[VIDEO] * (FRAMES * each), 153]
    else:
        parts = ([9 + frame, 10, 152, *[VIDEO] * each, 153] for frame in range(FRAMES))
        video = [token for part in parts for token in part]
    image = [152, *[IMAGE] * (PICTURE[0] * PICTURE[1]), 153]
    ids = torch.tensor([[5, 6, *video, 7, *image, 8, 9]])
    numbers = torch.Generator().manual_seed(3)
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": ((ids == IMAGE) + 2 * (ids == VIDEO)).int(),
        "pixel_values": torch.randn(PICTURE[0] * PICTURE[1] * 4, 96, generator=numbers),
        "image_grid_thw": torch.tensor([[1, 2 * PICTURE[0], 2 * PICTURE[1]]]),
        "pixel_values_videos": torch.randn(FRAMES * each * 4, 96, generator=numbers),
        "video_grid_thw": torch.tensor([[FRAMES, 2 * GRID[0], 2 * GRID[1]]]),
    }
    return {**call, "second_per_grid_ts": torch.tensor([1.0])} if name == "qwen2_5_vl" else call


def joined(levels: Any) -> Tensor:
    return levels if isinstance(levels, Tensor) else torch.cat([*levels])


def left_columns(run: Any, marks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return which columns are left, and those left of every frame and image."""
    keep, places, start, own = (
        torch.ones(len(marks), dtype=torch.bool),
        marks.nonzero()[:, 0],
        0,
        [],
    )
    for image in range(run.tokens.num_images):
        sequence = run.tokens.sequence(image)
        columns = places[start : start + sequence.total]
        start += sequence.total
        keep[columns] = False
        own.append(columns[sequence.place])
        keep[own[-1]] = True
    assert start == len(places)
    return keep, own


def closed(positions: Tensor, keep: Tensor, own: list[Tensor], ids: Tensor) -> Tensor:
    """Close the gaps of rows and columns in [3, L]; what follows an extent moves up with it."""
    result, marks = positions.clone(), (ids == IMAGE) | (ids == VIDEO)
    edges = [0, *(marks[1:] != marks[:-1]).nonzero()[:, 0].add(1).tolist(), len(ids)]
    upcoming = 0
    for start, end in pairwise(edges):
        if not marks[start]:
            result[:, start:end] = upcoming + torch.arange(end - start)
            upcoming += end - start
            continue
        left = [column for column in range(start, end) if keep[column]]
        result[0, left] = positions[0, left] - positions[0, start] + upcoming
        for axis in (1, 2):
            taken = sorted({*positions[axis, left].tolist()})
            ranks = [taken.index(place) for place in positions[axis, left].tolist()]
            result[axis, left] = upcoming + torch.tensor(ranks)
        upcoming = int(result[1:, left].max()) + 1
    return result


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_videos_and_images_of_qwen_decode_as_a_reference(name: str, positions: str) -> None:
    model, call = shared_model(name), call_of(name)
    ids = call["input_ids"][0]
    with torch.no_grad(), prune(model, "divprune", keep_ratio=0.2, positions=positions) as run:
        found = model(**call).logits
    assert run.trace is not None and run.trace.tokens_before == [24, 24, 24, 8]
    keep, own = left_columns(run, (ids == IMAGE) | (ids == VIDEO))
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {key: call[key] for key in names if key in call}
    full = model.model.get_rope_index(
        call["input_ids"], mm_token_type_ids=call["mm_token_type_ids"], **grids
    )[0][:, 0]
    assert name not in JOINT or len(full[0, ids == VIDEO].unique()) == FRAMES
    placed = full if positions == "original" else closed(full, keep, own, ids)
    assert positions == "original" or not torch.equal(placed[:, keep], full[:, keep])
    with torch.no_grad():
        image = model.model.get_image_features(
            call["pixel_values"], call["image_grid_thw"], return_dict=True
        )
        video = model.model.get_video_features(
            call["pixel_values_videos"], call["video_grid_thw"], return_dict=True
        )
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = joined(image.pooler_output).flatten(0, -2)
        embeds[ids == VIDEO] = joined(video.pooler_output).flatten(0, -2)
        visual, extra = ((ids == IMAGE) | (ids == VIDEO)) & keep, {}
        if getattr(image, "deepstack_features", None) is not None:
            levels = []
            for one, other in zip(image.deepstack_features, video.deepstack_features, strict=True):
                whole = torch.zeros_like(embeds)
                whole[ids == IMAGE], whole[ids == VIDEO] = joined(one), joined(other)
                levels.append(whole[visual])
            extra = {"visual_pos_masks": visual[keep][None], "deepstack_visual_embeds": levels}
        length = int(keep.sum())
        hidden = model.model.language_model(
            inputs_embeds=embeds[keep][None],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            position_ids=torch.cat([torch.arange(length)[None], placed[:, keep]])[:, None],
            use_cache=False,
            **extra,
        ).last_hidden_state
        wanted = model.lm_head(hidden)
    assert error([found], [wanted]) <= 1e-5


@pytest.mark.parametrize("name", QWEN)
def test_a_budget_of_the_prompt_is_shared_by_frames_and_images(name: str) -> None:
    model, call = shared_model(name), call_of(name)
    with torch.no_grad(), prune(model, "divprune", keep_tokens=20, scope="prompt") as run:
        model(**call)
    assert run.trace is not None and sum(run.trace.tokens_after) == 20
    with prune(model, "divprune", keep_ratio=0.4) as run:
        found = model.generate(**call, max_new_tokens=3, do_sample=False, eos_token_id=None)
        logits = model(**call).logits
    assert torch.equal(found[:, :-3], call["input_ids"])
    assert int(found[0, -3]) == int(logits[0, -1].argmax())


def test_videos_beside_images_of_onevision_decode_as_a_reference() -> None:
    model, image = shared_model("llava_onevision"), inputs_of("llava_onevision", [[(28, 28)]])
    tokens = FRAMES * 4 + 1
    ids = torch.tensor([[5, *[VIDEO] * tokens, 6, *image["input_ids"][0].tolist(), 7]])
    numbers = torch.Generator().manual_seed(3)
    call = {
        **image,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(1, FRAMES, 3, 28, 28, generator=numbers),
    }
    seen: dict[str, Any] = {}
    language = model.model.language_model
    handle = language.register_forward_pre_hook(
        lambda _, args, options: seen.update(options), with_kwargs=True
    )
    with torch.no_grad():
        model(**call)
    handle.remove()
    with torch.no_grad(), prune(model, "divprune", keep_ratio=0.5, positions="original") as run:
        found = model(**call).logits
    # The frames come after the images in the batch, and before them in the prompt.
    assert run.trace is not None and len(run.trace.tokens_after) == FRAMES + 1
    keep, _ = left_columns(run, (ids[0] == IMAGE) | (ids[0] == VIDEO))
    with torch.no_grad():
        hidden = language(
            inputs_embeds=seen["inputs_embeds"][:, keep],
            attention_mask=torch.ones(1, int(keep.sum()), dtype=torch.long),
            position_ids=keep.nonzero().T,
            use_cache=False,
        ).last_hidden_state
        assert error([found], [model.lm_head(hidden)]) <= 1e-5
