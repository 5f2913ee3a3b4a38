"""InternVL: tiles of 56 pixels, 8 x 8 patches, 16 tokens; crops, then a thumbnail."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

SIDE = 56
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 7, "use_qk_norm": True},
    **{"layer_scale_init_value": 1.0},
}


def build() -> Any:
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=InternVLVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = built(InternVLForConditionalGeneration, config)
    embeddings = model.model.vision_tower.embeddings
    numbers = torch.Generator().manual_seed(0)
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        # Both begin as zeros.
        parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.3
    return model


def tiles(size: tuple[int, int]) -> int:
    """Count the crops of about the shape of an image, and its thumbnail."""
    height, width = (max(1, round(edge / 50)) for edge in size)
    return 1 if height * width == 1 else height * width + 1


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, lambda size: [152, *[IMAGE] * (16 * tiles(size)), 153], seed)
    pixels = pictures(rows, lambda size: (tiles(size), 3, SIDE, SIDE), seed)
    return {**made, "pixel_values": torch.cat(pixels)} if pixels else made
