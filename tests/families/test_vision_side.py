"""What families read inside towers, against what the towers compute themselves."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from family_checks import NAMES, inputs_of, pixels_of, shared_model, tiny
from torch import Tensor

from llava.model.multimodal_encoder.readings import block_of
from llava.pruning import prune
from llava.pruning.lookup import FAMILIES

QWEN = [name for name in NAMES if name.startswith("qwen")]
ATTENTION = ("cls_attention", "received_attention", "object_attention")
# Of different shapes; without canvases that OneVision would interpolate.
IMAGES: list[list[tuple[int, int]]] = [[(56, 40), (28, 28)], [(40, 112), (24, 56)]]


def encoded(name: str, model: Any, inputs: dict[str, Any], *needs: str) -> Any:
    """Return the tokens of all images of a call."""
    family = FAMILIES.get(name)()
    given = {key: inputs.get(key) for key in family.pixels}
    with torch.no_grad(), prune(model):  # the hooks are there, nothing is pruned
        found = family.encode(model, given, inputs["input_ids"], {*needs})
    return getattr(found, "visual", found)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_models_own_and_made_of_their_features(name: str) -> None:
    model, inputs = shared_model(name), inputs_of(name, IMAGES)
    visual, family = encoded(name, model, inputs), FAMILIES.get(name)()
    for group in getattr(visual, "groups", (visual,)):
        valid = group.valid_mask()
        with torch.no_grad():
            made = group.projector(group.features)
        assert torch.allclose(made[valid], group.projected[valid], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        own = model.model.get_image_features(**pixels_of(family, inputs), return_dict=True)
    tokens = [part.flatten(0, -2) for part in own.pooler_output]
    found = [visual.embeddings(image) for image in range(visual.num_images)]
    assert torch.equal(torch.cat(found), torch.cat(tokens))


def in_raster_order(name: str, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the values of an image's tokens in raster order; Qwen2.5 has windows of 2 x 2."""
    if name != "qwen2_5_vl":
        return values
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    windows = sorted(places, key=lambda at: (at[0] // 2, at[1] // 2, *at))
    result = torch.empty_like(values)
    result[[row * grid[1] + column for row, column in windows]] = values
    return result


@pytest.mark.parametrize("name", QWEN)
def test_qwen_reads_the_attention_that_its_tower_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny(name).build(), inputs_of(name, IMAGES)
    visual = encoded(name, model, inputs, *ATTENTION, "encoder_keys")
    module = importlib.import_module(type(model).__module__)
    seen: list[tuple[Any, Tensor]] = []
    eager = module.eager_attention_forward

    def spy(attention: Any, *args: Any, **options: Any) -> Any:
        output = eager(attention, *args, **options)
        seen.append((attention, output[1]))
        return output

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    model.set_attn_implementation("eager")
    tower = model.model.visual
    hidden: list[Tensor] = []
    handle = tower.blocks[-1].attn.qkv.register_forward_hook(lambda _, x, out: hidden.append(out))
    with torch.no_grad():
        family = FAMILIES.get(name)()
        model.model.get_image_features(**pixels_of(family, inputs), return_dict=True)
    handle.remove()
    grids = [(int(rows) // 2, int(columns) // 2) for _, rows, columns in inputs["image_grid_thw"]]
    sizes = [rows * columns for rows, columns in grids]
    for need in ATTENTION:
        block = tower.blocks[block_of(need, len(tower.blocks), len(tower.blocks))]
        maps = [weights[0] for attention, weights in seen if attention is block.attn]
        received = torch.cat([own.mean(dim=1).sum(dim=0) for own in maps])
        tokens = received.view(-1, 4).sum(dim=1).split(sizes)
        for found, own, grid in zip(visual.extras[need], tokens, grids, strict=True):
            assert torch.allclose(found, in_raster_order(name, own, grid), rtol=1e-4), need
    keys = hidden[0].view(len(hidden[0]), 3, tower.blocks[-1].attn.num_heads, -1)[:, 1]
    means = keys.mean(dim=1).unflatten(0, (-1, 4)).mean(dim=1).split(sizes)
    for found, own, grid in zip(visual.extras["encoder_keys"], means, grids, strict=True):
        assert torch.allclose(found, in_raster_order(name, own, grid), rtol=1e-3, atol=1e-5)


def patches_of(picture: Tensor) -> Tensor:
    """Cut a picture [3, H, W] as Qwen's processor does: 4 x 4 pixels, those of a token in turn."""
    _, height, width = picture.shape
    pairs = picture[None].repeat(2, 1, 1, 1)
    cut = pairs.view(1, 2, 3, height // 8, 2, 4, width // 8, 2, 4)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * 4 * 4)


@pytest.mark.parametrize("name", QWEN)
def test_a_bright_square_is_found_where_it_is(name: str) -> None:
    model, (height, width) = shared_model(name), (56, 40)
    count = height * width // 64
    inputs = {
        "input_ids": torch.tensor([[5, 152, *[150] * count, 153, 6]]),
        "image_grid_thw": torch.tensor([[1, height // 4, width // 4]]),
    }
    for row, column in ((0, 0), (0, 4), (3, 2), (5, 1), (6, 4)):
        picture = torch.zeros(3, height, width)
        dark = encoded(name, model, {**inputs, "pixel_values": patches_of(picture)}).groups[0]
        picture[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 3
        lit = encoded(name, model, {**inputs, "pixel_values": patches_of(picture)}).groups[0]
        for kind in ("features", "projected"):
            change = (getattr(lit, kind) - getattr(dark, kind))[0].norm(dim=-1)
            assert int(change.argmax()) == row * (width // 8) + column
        assert lit.layouts is not None
        layout = FAMILIES.get(name)().located(model, lit.layouts[0], (3 * width, 3 * height))
        box = lit.boxes(0, layout)[row * (width // 8) + column]
        assert box == (column * 24, row * 24, column * 24 + 24, row * 24 + 24)
