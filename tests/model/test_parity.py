"""The same random weights give the same logits in transformers' own LLaVA and LLaVA-NeXT."""

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers import LlavaConfig as HFConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape, process_images
from llava.model import LlavaLlamaForCausalLM

IMG, PATCHES, HF_IMAGE = IMAGE_TOKEN_INDEX, 4, 63


@pytest.fixture
def pair(small_model: Callable) -> tuple[LlavaLlamaForCausalLM, LlavaForConditionalGeneration]:
    ours = small_model()
    return ours, _converted(ours, HFConfig, LlavaForConditionalGeneration)


@pytest.fixture
def next_pair(
    small_next: Callable,
) -> tuple[LlavaLlamaForCausalLM, LlavaNextForConditionalGeneration]:
    ours = small_next()
    canvases = [[height, width] for width, height in ours.config.image_grid_pinpoints]
    return ours, _converted(
        ours, LlavaNextConfig, LlavaNextForConditionalGeneration, image_grid_pinpoints=canvases
    )


def _converted(ours: LlavaLlamaForCausalLM, config_class: type, model: type, **more: object):
    """transformers' model of the given class with our weights."""
    config = config_class(
        vision_config=CLIPVisionConfig(**ours.get_vision_tower().config.to_dict()),
        text_config=LlamaConfig(
            **{
                key: getattr(ours.config, key)
                for key in (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
                    *("num_attention_heads", "rms_norm_eps", "pad_token_id"),
                )
            }
        ),
        image_token_index=HF_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        **more,
    )
    theirs = model(config).eval()
    names = {
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.image_newline": "model.image_newline",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }
    state = {}
    for key, value in ours.state_dict().items():
        old, new = next((old, new) for old, new in names.items() if key.startswith(old))
        state[new + key.removeprefix(old)] = value
    theirs.load_state_dict(state)
    return theirs


def _expand(
    rows: list[list[int]], counts: Iterable[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids with one placeholder for each visual token, as transformers wants them."""
    counts = repeat(PATCHES) if counts is None else iter(counts)
    full = [
        [t for x in row for t in ([HF_IMAGE] * next(counts) if x == IMG else [x])] for row in rows
    ]
    longest = max(map(len, full))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in full])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in full])
    return ids, mask


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 5, IMG, 9, 11]],
        [[1, IMG, 5, IMG, 9]],
        [[1, 5, IMG, 9, 11, 12], [1, IMG, 7], [1, IMG, 8, IMG, 3]],
    ],
    ids=["one image", "two images in a prompt", "left-padded batch"],
)
def test_logits_equal(rows: list[list[int]], pair: tuple, pixels: Callable, record_error) -> None:
    ours, theirs = pair
    ours.config.tokenizer_padding_side = "left"
    images = pixels(sum(row.count(IMG) for row in rows), side=28)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    hf_ids, hf_mask = _expand(rows)
    with torch.no_grad():
        got = ours(ids, attention_mask=mask, images=images).logits
        positions = (hf_mask.cumsum(-1) - 1).clamp(min=0)
        wanted = theirs(
            input_ids=hf_ids, attention_mask=hf_mask, pixel_values=images, position_ids=positions
        ).logits
    assert got.shape == wanted.shape
    error = (got - wanted)[hf_mask.bool()].abs().max().item()
    record_error("transformers' LLaVA: logits", error)
    assert error <= 1e-4
    assert wanted[hf_mask.bool()].std() > 0.5, "logits too small to compare"
    greedy = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    new = ours.generate(ids, attention_mask=mask, images=images, **greedy)
    theirs_new = theirs.generate(
        input_ids=hf_ids, attention_mask=hf_mask, pixel_values=images, **greedy
    )
    assert new.tolist() == theirs_new[:, hf_ids.shape[1] :].tolist()


VGA, WIDE, TALL = (640, 480), (1180, 310), (260, 900)


# The last two are sizes where transformers unpads otherwise than LLaVA: pixels agree even there.
# Both get their canvases in one order, because a tie goes to the first.
@pytest.mark.parametrize(
    "size",
    [
        *((64, 48), (118, 31), (26, 90), (56, 56), (33, 47), (200, 20), (20, 20), (28, 28)),
        *((1, 300), (640, 480), (1180, 310), (205, 984), (376, 893)),
    ],
    ids=str,
)
def test_tiles_are_those_of_transformers(size: tuple[int, int]) -> None:
    side, canvases = 28, [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]
    square = {"height": side, "width": side}
    settings = {"size": {"shortest_edge": side}, "crop_size": square}
    theirs = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[height, width] for width, height in canvases], **settings
    )
    levels = torch.randint(
        256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    image = Image.fromarray(levels.numpy())
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=canvases)
    got = process_images([image], CLIPImageProcessorPil(**settings), config)[0]
    wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(got, wanted)
    assert got.shape[0] > 2 and got.std() > 0.1


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        ([[1, 5, IMG, 9, 11]], [VGA]),
        ([[1, 5, IMG, 9, 11]], [WIDE]),
        ([[1, 5, IMG, 9, 11]], [TALL]),
        ([[1, IMG, 5, IMG, 9]], [WIDE, TALL]),
        ([[1, 5, IMG, 9, 11, 12], [1, IMG, 7], [1, IMG, 8, IMG, 3]], [VGA, WIDE, TALL, (300, 20)]),
    ],
    ids=["640x480", "wide", "tall", "two images in a prompt", "batch of different tiles"],
)
def test_next_logits_equal(rows, sizes, next_pair: tuple, pixels: Callable, record_error) -> None:
    ours, theirs = next_pair
    ours.config.tokenizer_padding_side = "left"
    grids = [ours.config.image_grid_pinpoints, 28]
    tiles = [math.prod(get_anyres_image_grid_shape(size, *grids)) + 1 for size in sizes]
    images = [pixels(count, side=28, seed=seed) for seed, count in enumerate(tiles)]
    padded = torch.stack(
        [torch.nn.functional.pad(x, (0,) * 7 + (max(tiles) - len(x),)) for x in images]
    )
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    given = {"images": images, "image_sizes": sizes}
    with torch.no_grad():
        visual = ours.encode_visual_tokens(**given)
        got = ours(ids, attention_mask=mask, **given).logits
    counts = [len(visual.embeddings(i)) for i in range(len(sizes))]
    hf_ids, hf_mask = _expand(rows, counts)
    hf_given = {
        "pixel_values": padded,
        "image_sizes": torch.tensor([[height, width] for width, height in sizes]),
    }
    with torch.no_grad():
        positions = (hf_mask.cumsum(-1) - 1).clamp(min=0)
        wanted = theirs(
            input_ids=hf_ids, attention_mask=hf_mask, position_ids=positions, **hf_given
        ).logits
    assert got.shape == wanted.shape
    error = (got - wanted)[hf_mask.bool()].abs().max().item()
    record_error("transformers' LLaVA-NeXT: logits", error)
    assert error <= 1e-4
    greedy = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    new = ours.generate(ids, attention_mask=mask, **given, **greedy)
    theirs_new = theirs.generate(input_ids=hf_ids, attention_mask=hf_mask, **hf_given, **greedy)
    assert new.tolist() == theirs_new[:, hf_ids.shape[1] :].tolist()
