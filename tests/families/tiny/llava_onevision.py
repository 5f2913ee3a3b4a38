"""LLaVA-OneVision: crops of 28 pixels, 16 patches each; canvases of more than 2 are reduced."""

from __future__ import annotations

import math
from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from torch.nn.functional import pad
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

SIDE, PATCHES, MOST = 28, 4, 2
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": SIDE // PATCHES},
    "vision_use_head": False,
}
PINPOINTS = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def build() -> Any:
    return built(
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(
            text_config=Qwen2Config(**TEXT),
            vision_config=SiglipVisionConfig(**VISION),
            image_token_id=IMAGE,
            video_token_id=151,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=f"anyres_max_{MOST}",
        ),
    )


def tokens(size: tuple[int, int]) -> int:
    """Count the tokens of an image alone in its prompt, as its processor does."""
    height, width = size
    rows, columns = (n * PATCHES for n in get_anyres_image_grid_shape(size, PINPOINTS, SIDE))
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    ratio = math.sqrt(rows * columns / (MOST * PATCHES**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return PATCHES**2 + rows * (columns + 1)


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    # Images of prompts with several are one tile and a newline.
    counts = iter([tokens(size) if len(row) == 1 else 17 for row in rows for size in row])
    made = prompts(rows, lambda size: [IMAGE] * next(counts), seed)
    sizes = [size for row in rows for size in row]
    if not sizes:
        return made
    tiles = [
        image_size_to_num_patches(size, PINPOINTS, SIDE) if len(row) == 1 else 1
        for row in rows
        for size in row
    ]
    views = iter(tiles)
    pixels = pictures(rows, lambda size: (next(views), 3, SIDE, SIDE), seed)
    filled = [pad(image, (0, 0, 0, 0, 0, 0, 0, max(tiles) - len(image))) for image in pixels]
    return {
        **made,
        "pixel_values": torch.stack(filled),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor([len(row) for row in rows]),
    }
