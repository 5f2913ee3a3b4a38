"""Qwen2-VL."""

from __future__ import annotations

from typing import Any

from qwen_parts import LANGUAGE, MARKS, VISION, inputs
from tiny_parts import built
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

__all__ = ["build", "inputs"]


def build() -> Any:
    vision = {**VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=LANGUAGE, vision_config=vision, **MARKS)
    return built(Qwen2VLForConditionalGeneration, config)
