"""PaliGemma: 4 x 4 patches and tokens an image; all of a prompt sees all of it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": 28, "patch_size": 7, "projection_dim": 64},
    "vision_use_head": False,
}


def build() -> Any:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**TEXT, head_dim=16),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return built(PaliGemmaForConditionalGeneration, config)


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, lambda size: [IMAGE] * 16, seed)
    # No suffix: all tokens are of the prefix.
    made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    pixels = pictures(rows, lambda size: (3, 28, 28), seed)
    return {**made, "pixel_values": torch.stack(pixels)} if pixels else made
