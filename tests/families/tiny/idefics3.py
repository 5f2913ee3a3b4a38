"""Idefics3."""

from __future__ import annotations

from typing import Any

from idefics_parts import inputs, settings, tiles
from tiny_parts import built
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

__all__ = ["build", "inputs", "tiles"]


def build() -> Any:
    return built(Idefics3ForConditionalGeneration, Idefics3Config(**settings()))
