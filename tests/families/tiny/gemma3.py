"""Gemma 3: 8 x 8 patches, 16 tokens an image; one layer in two has a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

SIDE = 56
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 7},
    "vision_use_head": False,
}


def build() -> Any:
    text = {
        **{**TEXT, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16},
        **{"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
    }
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    model = built(Gemma3ForConditionalGeneration, config)
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    numbers = torch.Generator().manual_seed(0)
    weight.data = torch.randn(weight.shape, generator=numbers) * 0.3  # zeros at first
    return model


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, lambda size: [152, *[IMAGE] * 16, 153], seed)
    made["token_type_ids"] = (made["input_ids"] == IMAGE).long()
    pixels = pictures(rows, lambda size: (3, SIDE, SIDE), seed)
    return {**made, "pixel_values": torch.stack(pixels)} if pixels else made
