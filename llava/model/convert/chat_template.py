"""Conversation templates as the Jinja text that Hugging Face's processors render.

Messages are those of transformers: a role (`system`, `user`, `assistant`) and a content, a text or
a list of `{"type": "image"}` and `{"type": "text", "text": ...}`. Images come first, each as its
mark on a line of its own, as LLaVA was trained.
"""

import json
from collections.abc import Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import tokenizer_image_token
from llava.utils import UserInputError

# Two turns, so that what follows an image and what follows an answer are both looked at.
_PROBE = ("What is shown here?", "A red ball.", "Where is it?")

# %MARK% is the mark of an image with what follows it, %SYSTEM% the template's own system text.
_HEAD = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content | replace(%IMAGE%, %MARK%) }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ %MARK% + '\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = %SYSTEM% -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = said(messages[0]['content']) -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
"""
_NAMED_TURNS = """\
{{- system + %END_OF_SYSTEM% -}}
{%- for message in turns -%}
{%- set text = said(message['content']) -%}
{%- if message['role'] == 'user' -%}{{ %USER% }}{%- if text -%}{{ %SPACE% + text + %END_OF_USER% }}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{ %ASSISTANT% }}{%- if text -%}{{ %SPACE% + text + %END_OF_ASSISTANT% }}{%- endif -%}
{%- else -%}
{{ raise_exception('roles are user and assistant, after one system message at most') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ %ASSISTANT% }}{%- endif -%}
"""
_LLAMA_2_TURNS = """\
{%- if not turns or turns[0]['role'] != 'user' -%}
{{ raise_exception('a conversation must open with a message of the user') }}
{%- endif -%}
{%- for message in turns -%}
{%- set text = said(message['content']) -%}
{%- if message['role'] == 'user' -%}
{%- if not loop.first -%}{{ %START% }}{%- endif -%}
{{ '[INST] ' }}
{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}
{{ text + ' [/INST]' }}
{%- elif text -%}{{ ' ' + text + ' ' + %END% }}
{%- endif -%}
{%- endfor -%}
"""


def write_template(conversation: Conversation, native: Any, stock: Any, where: str) -> str:
    """Write a conversation template as Jinja, so that its ids are those of LLaVA.

    LLaVA splits the texts around an image one by one, so each may begin with a space token;
    tokenizers of Hugging Face split the text after a mark as the middle of a text. Where they
    differ, a space after the mark makes up for it.

    Args:
        conversation: the template; its messages are its own examples.
        native: tokenizer of this package.
        stock: transformers' tokenizer of the converted checkpoint, in which a mark is one token.
        where: what errors call the checkpoint.

    Raises:
        UserInputError: a template without turns, or a tokenizer whose ids cannot be had in this
            way.
    """
    if conversation.sep_style is SeparatorStyle.PLAIN:
        raise UserInputError(
            f"{where!r} has a conversation template for captions, not for a chat; set mm_conv_mode "
            "in its config.json to that of its language model, such as 'vicuna_v1'"
        )
    wanted = tokenizer_image_token(_rendered(conversation), native)
    image_token = stock.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    for gap in ("", " "):
        template = as_jinja(conversation, gap)
        text = stock.apply_chat_template(
            _messages(_PROBE), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids = stock(text).input_ids
        if [IMAGE_TOKEN_INDEX if i == image_token else i for i in ids] == wanted:
            return template
    raise UserInputError(
        f"the tokenizer of {where!r} splits prompts in a way that Hugging Face's cannot repeat, so "
        "answers would differ; use this checkpoint as it is"
    )


def as_jinja(conversation: Conversation, gap: str = "") -> str:
    """Return the Jinja text of a conversation template, with `gap` after every image mark."""
    style = conversation.sep_style
    head = conversation.copy()
    examples = head.get_prompt().removeprefix(head.system + head.sep) if head.messages else ""
    colon = style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
    same_end = style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
    user, assistant = conversation.roles
    values = {
        "IMAGE": DEFAULT_IMAGE_TOKEN,
        "MARK": DEFAULT_IMAGE_TOKEN + gap,
        "SYSTEM": conversation.system,
        "END_OF_SYSTEM": conversation.sep + examples,
        "USER": f"{user}:" if colon else user,
        "ASSISTANT": f"{assistant}:" if colon else assistant,
        "SPACE": " " if colon else "",
        "END_OF_USER": conversation.sep,
        "END_OF_ASSISTANT": conversation.sep if same_end else conversation.sep2 or "",
        "START": conversation.sep,
        "END": conversation.sep2 or "",
    }
    template = _HEAD + (_LLAMA_2_TURNS if style is SeparatorStyle.LLAMA_2 else _NAMED_TURNS)
    for name, value in values.items():
        template = template.replace(f"%{name}%", json.dumps(value))
    return template


def _rendered(conversation: Conversation) -> str:
    """Render the probe as this package does, open for an answer."""
    chat = conversation.copy()
    first, *rest = _PROBE
    for index, text in enumerate([f"{DEFAULT_IMAGE_TOKEN}\n{first}", *rest, None]):
        chat.append_message(chat.roles[index % 2], text)
    return chat.get_prompt()


def _messages(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return turns as transformers takes them, an image in the first."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages
