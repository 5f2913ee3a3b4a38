"""SmolVLM."""

from __future__ import annotations

from typing import Any

from idefics_parts import inputs, settings, tiles
from tiny_parts import built
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

__all__ = ["build", "inputs", "tiles"]


def build() -> Any:
    return built(SmolVLMForConditionalGeneration, SmolVLMConfig(**settings()))
