"""Prompts of single questions, rendered with a model's own conversation template."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.mm_utils import tokenize_pieces


def image_mark(config: Any) -> str:
    """Return the line that marks the image at the start of the first turn."""
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    return mark + "\n"


def bare_question(text: str) -> str:
    """Remove the image marks that some question files carry; other text stays as it is."""
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def has_inner_marks(text: str, images: int) -> bool:
    """Return whether the text marks all of its images, and not only at its start."""
    rest = text
    while rest.lstrip().startswith(DEFAULT_IMAGE_TOKEN):
        rest = rest.lstrip().removeprefix(DEFAULT_IMAGE_TOKEN)
    return DEFAULT_IMAGE_TOKEN in rest and text.count(DEFAULT_IMAGE_TOKEN) == images


def question_prompt(text: str, template: str, config: Any, images: int = 1) -> str:
    """Render one user turn that asks `text` about `images` images, open for the answer.

    The marks of the images come first, each on a line; a mark that the text begins with is not
    doubled. Where the text marks all images and not only at its start, they stay where they are.
    """
    mark = image_mark(config)
    if has_inner_marks(text, images):
        return open_turn(text.replace(DEFAULT_IMAGE_TOKEN, mark.removesuffix("\n")), template)
    return open_turn(mark * images + bare_question(text), template)


def open_turn(text: str, template: str) -> str:
    """Render one user turn that says `text`, open for the answer."""
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def prompt_ids(prompts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] and mask [B, L] of prompts, padded as in `pad_rows`."""
    return pad_rows([tokenize_pieces(p.split(DEFAULT_IMAGE_TOKEN), tokenizer) for p in prompts])


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] and mask [B, L], padded on the right; the splice pads again."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True)


def image_ranges(counts: Sequence[int]) -> list[range]:
    """Number the images of prompts through the whole batch, from how many each prompt has."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def count_visual_tokens(ids: Tensor, images: Sequence[int], length: int) -> int:
    """Count the tokens of a merged row of `length` that are not text.

    The prompt is `ids` [L], its images have so many tokens each. Only where the row was cut to
    the model's limit do they matter: some of what was cut may have been text.
    """
    text = int((ids != IMAGE_TOKEN_INDEX).sum())
    if not images or length == text + sum(images):
        return length - text if images else 0
    left, place, visual = list(images), 0, 0
    for token in ids.tolist():
        size = left.pop(0) if token == IMAGE_TOKEN_INDEX else 1
        if token == IMAGE_TOKEN_INDEX:
            visual += max(0, min(size, length - place))
        place += size
    return visual
