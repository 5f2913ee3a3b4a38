"""Prompts of single questions, rendered with a model's own conversation template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token


def image_mark(config: Any) -> str:
    """The line that stands for the image at the start of the first turn."""
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    return mark + "\n"


def bare_question(text: str) -> str:
    """The text without the image mark that some question files carry; else as it is."""
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def question_prompt(text: str, template: str, config: Any, images: int = 1) -> str:
    """One user turn asking `text` after the marks of `images` images, open for the answer.

    A mark that the text carries already is never doubled.
    """
    conversation = conv_templates[template].copy()
    marks = image_mark(config) * images
    conversation.append_message(conversation.roles[0], marks + bare_question(text))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def prompt_ids(prompts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and mask [B, L] of prompts, padded on the right (the splice pads anew)."""
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in prompts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask
