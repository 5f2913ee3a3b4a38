"""Qwen2.5-VL: windows of 16 pixels, all of the image in the last block."""

from __future__ import annotations

from typing import Any

from qwen_parts import LANGUAGE, MARKS, VISION, inputs
from tiny_parts import built
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

__all__ = ["build", "inputs"]


def build() -> Any:
    own = {"window_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [2]}
    config = Qwen2_5_VLConfig(text_config=LANGUAGE, vision_config={**VISION, **own}, **MARKS)
    return built(Qwen2_5_VLForConditionalGeneration, config)
