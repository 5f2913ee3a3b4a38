"""Dialogues in LLaVA's conversation templates, as text and as ids."""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.families.dialogue import Dialogue, literal, split_at_marks, text_of

_CHATML_SYSTEM = "<|im_start|>system\n"  # comes before the system text of such templates


def prompt_pieces(dialogue: Dialogue, template: str, config: Any) -> list[str]:
    """Render a dialogue and return the texts between its images: one more than there are images.

    Args:
        dialogue: what is said.
        template: key of `conv_templates`.
        config: the model's; some models have text around every mark (`mm_use_im_start_end`).
    """
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False) and not dialogue.bare_marks:
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    conversation = conv_templates[template].copy()
    if dialogue.system is not None:
        start = _CHATML_SYSTEM if conversation.system.startswith(_CHATML_SYSTEM) else ""
        conversation.system = start + literal(dialogue.system)
    for number, turn in enumerate(dialogue.turns):
        conversation.append_message(conversation.roles[number % 2], text_of(turn, mark))
    if dialogue.is_open:
        conversation.append_message(conversation.roles[1], None)
    return split_at_marks(conversation.get_prompt())


def render(dialogue: Dialogue, template: str, config: Any = None) -> str:
    """Render a dialogue as `prompt_pieces` does, `<image>` at every mark."""
    return DEFAULT_IMAGE_TOKEN.join(prompt_pieces(dialogue, template, config))
