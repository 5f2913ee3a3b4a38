"""Turn conversations into token ids, labels and turn numbers."""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, cat, full_like, tensor, zeros_like

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.train.samples import Sample
from llava.utils import UserInputError


class Part(NamedTuple):
    """A stretch of a training prompt: what the model writes itself is learnt."""

    text: str
    learnt: bool


class Tokens(NamedTuple):
    """A sample for the model, each int64 `[L]`.

    Attributes:
        ids: with `IMAGE_TOKEN_INDEX` at every image mark.
        labels: the id where a token belongs to an answer, else `IGNORE_INDEX`.
        turns: 0 for what all turns see; 1, 2, ... for turns that do not see one another.
    """

    ids: Tensor
    labels: Tensor
    turns: Tensor


def render(sample: Sample, template: Conversation) -> list[Part]:
    """Render a sample under `template`; learnt are answers with the marks that end them.

    As in LLaVA, the only `<image>` of a message moves to its start; several stay where they are.

    Raises:
        UserInputError: the sample does not fit the template.
    """
    conversation = template.copy()
    texts = list(sample.turns)
    if template.sep_style is SeparatorStyle.PLAIN:
        # Captions: the image alone stands for the question, and the separator ends the caption.
        conversation = dataclasses.replace(conversation, sep="", sep2=template.sep)
        texts = _caption(sample)
    for index, text in enumerate(texts):
        if text.count(DEFAULT_IMAGE_TOKEN) == 1:
            text = _with_marks(text, 1)
        if "mmtag" in template.version:
            text = text.replace(DEFAULT_IMAGE_TOKEN, f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
        conversation.append_message(conversation.roles[index % 2], text)
    try:
        pieces = list(conversation.pieces())
    except UserInputError as error:
        raise UserInputError(f"{sample.name}: {error}") from error
    return [
        Part(
            piece.text,
            # The template's own example dialogue stands before `offset`.
            piece.message is not None
            and piece.message >= template.offset
            and (piece.message - template.offset) % 2 == 1,
        )
        for piece in pieces
    ]


def tokenize(parts: list[Part], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return ids and labels of a rendered sample, both int64 `[L]`.

    Ids equal `tokenizer_image_token`'s: every chunk between images is tokenised by itself, with
    one leading BOS. What is learnt is known for every character and handed on by the tokenizer's
    offsets, so neither words in a text nor a version of the tokenizer can shift it. A token is
    learnt where any of its characters is.
    """
    learnt = bytearray(b"".join(bytes([part.learnt]) * len(part.text) for part in parts))
    ids: list[int] = []
    labels: list[int] = []
    offset = 0
    for index, chunk in enumerate("".join(part.text for part in parts).split(DEFAULT_IMAGE_TOKEN)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            offset += len(DEFAULT_IMAGE_TOKEN)
        encoded = tokenizer(chunk, return_offsets_mapping=True)
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        if index and pairs and ids[0] == pairs[0][0] == tokenizer.bos_token_id:
            pairs = pairs[1:]
        for token, (start, end) in pairs:
            ids.append(token)
            labels.append(token if 1 in learnt[offset + start : offset + end] else IGNORE_INDEX)
        offset += len(chunk)
    return tensor(ids), tensor(labels)


def tokenize_sample(sample: Sample, template: Conversation, tokenizer: Any) -> Tokens:
    """Tokenise a sample whose turns follow one another."""
    ids, labels = tokenize(render(sample, template), tokenizer)
    return Tokens(ids, labels, zeros_like(ids))


def tokenize_turns(sample: Sample, template: Conversation, tokenizer: Any) -> Tokens:
    """Tokenise a sample with images whose turns do not see one another.

    Every question follows all images as if it were the first one asked. What all prompts share, up
    to and with the last image mark, is there once and has turn 0; the turns 1, 2, ... follow. A
    last question without an answer has nothing to learn and is left out.
    """
    count = len(sample.images)
    parts: list[Tokens] = []
    for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=False):
        alone = sample._replace(turns=(_with_marks(question, count), answer))
        ids, labels = tokenize(render(alone, template), tokenizer)
        shared = int((ids == IMAGE_TOKEN_INDEX).nonzero()[-1]) + 1
        if not parts:
            parts.append(Tokens(ids[:shared], labels[:shared], zeros_like(ids[:shared])))
        rest = ids[shared:]
        parts.append(Tokens(rest, labels[shared:], full_like(rest, len(parts))))
    return Tokens(*(cat(column) for column in zip(*parts, strict=True)))


def _with_marks(text: str, count: int) -> str:
    """Return `text` with `count` image marks in front of it and none inside."""
    text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return (f"{DEFAULT_IMAGE_TOKEN}\n" * count + text).rstrip()


def _caption(sample: Sample) -> list[str]:
    """Return image mark and caption of a sample for projector pre-training."""
    if len(sample.turns) != 2 or len(sample.images) != 1:
        raise UserInputError(
            f"{sample.name} has {len(sample.turns)} turns and {len(sample.images)} images; the "
            "template 'plain' learns captions: give one question with <image>, and its answer; or "
            "use another --version"
        )
    return [DEFAULT_IMAGE_TOKEN, sample.turns[1]]
