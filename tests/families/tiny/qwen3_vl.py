"""Qwen3-VL: features of the first two blocks go into the first two layers."""

from __future__ import annotations

from typing import Any

from qwen_parts import LANGUAGE, MARKS, ROPE, VISION, inputs
from tiny_parts import built
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

__all__ = ["build", "inputs"]


def build() -> Any:
    text = {**LANGUAGE, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    own = {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(text_config=text, vision_config={**VISION, **own}, **MARKS)
    return built(Qwen3VLForConditionalGeneration, config)
