"""Prompts of single questions, rendered with a model's own conversation template."""

from __future__ import annotations

from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava.conversation import conv_templates


def image_mark(config: Any) -> str:
    """The line that stands for the image at the start of the first turn."""
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    return mark + "\n"


def bare_question(text: str) -> str:
    """The text without the image mark that some question files carry."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def question_prompt(text: str, template: str, config: Any, with_image: bool = True) -> str:
    """One user turn asking `text`, open for the answer; without the image mark if told so.

    A mark that the text carries already is never doubled.
    """
    conversation = conv_templates[template].copy()
    mark = image_mark(config) if with_image else ""
    conversation.append_message(conversation.roles[0], mark + bare_question(text))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
