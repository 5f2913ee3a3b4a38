"""LLaVA-1.5: images of 28 pixels, 16 tokens each."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, built, pictures, prompts
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": 28, "patch_size": 7},
}


def build(text: Any = None, vision: Any = None) -> Any:
    return built(
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config=text or LlamaConfig(**TEXT),
            vision_config=vision or CLIPVisionConfig(**VISION),
            image_token_id=IMAGE,
            image_seq_length=16,
        ),
    )


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, lambda size: [IMAGE] * 16, seed)
    pixels = pictures(rows, lambda size: (3, 28, 28), seed)
    return {**made, "pixel_values": torch.stack(pixels)} if pixels else made
