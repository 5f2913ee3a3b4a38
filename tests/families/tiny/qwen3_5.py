"""Qwen3.5: two layers of linear attention, two of full attention."""

from __future__ import annotations

from typing import Any

import torch
from qwen_parts import LANGUAGE, MARKS, ROPE, VISION, inputs
from tiny_parts import built
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

__all__ = ["build", "inputs"]


def build() -> Any:
    text = {
        **{**LANGUAGE, "num_hidden_layers": 4, "head_dim": 16},
        "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }
    own = {"out_hidden_size": 64, "num_position_embeddings": 64}
    config = Qwen3_5Config(text_config=text, vision_config={**VISION, **own}, **MARKS)
    model = built(Qwen3_5ForConditionalGeneration, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attn" in name and parameter.dim() > 1:
                parameter.div_(4)  # what rounds differently beside padding must not grow
    return model
