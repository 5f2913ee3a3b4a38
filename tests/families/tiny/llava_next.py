"""LLaVA-1.6: a base view and up to four crops of 28 pixels, 16 patches each, and newlines."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from torch.nn.functional import pad
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

SIDE, PATCHES = 28, 4
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": SIDE // PATCHES},
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def build(text: Any = None) -> Any:
    return built(
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(
            text_config=text or LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        ),
    )


def tokens(size: tuple[int, int]) -> int:
    """Count an image's tokens as its processor does: base view, crops without padding, newlines."""
    height, width = size
    rows, columns = (n * PATCHES for n in get_anyres_image_grid_shape(size, PINPOINTS, SIDE))
    if width / height > columns / rows:
        rows -= (rows - round(height * columns / width, 7).__floor__()) // 2 * 2
    else:
        columns -= (columns - round(width * rows / height, 7).__floor__()) // 2 * 2
    return PATCHES**2 + rows * columns + rows


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, lambda size: [IMAGE] * tokens(size), seed)
    sizes = [size for row in rows for size in row]
    if not sizes:
        return made
    tiles = [image_size_to_num_patches(size, PINPOINTS, SIDE) for size in sizes]
    by_size = dict(zip(sizes, tiles, strict=True))
    pixels = pictures(rows, lambda size: (by_size[size], 3, SIDE, SIDE), seed)
    filled = [pad(image, (0, 0, 0, 0, 0, 0, 0, max(tiles) - len(image))) for image in pixels]
    return {**made, "pixel_values": torch.stack(filled), "image_sizes": torch.tensor(sizes)}
