"""Turn conversations into token ids, labels and turn numbers."""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, cat, full_like, tensor, zeros_like

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import tokenizer_image_token
from llava.train.samples import Sample
from llava.utils import UserInputError

_END = "</s>"  # of an answer, in the templates that end one with a token of its own
_SHOWN = 200  # characters of a sample in an error


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


def render(sample: Sample, template: Conversation, start_end: bool = False) -> list[Part]:
    """Render a sample under `template`; learnt are answers with the marks that end them.

    As in LLaVA, the only `<image>` of a message moves to its start; several stay where they are.

    Args:
        sample: what is said.
        template: how it is written.
        start_end: write `<im_start>` before and `<im_end>` behind every image, captions of the
            template `plain` excepted, as LLaVA does for `mm_use_im_start_end`.

    Raises:
        UserInputError: the sample does not fit the template.
    """
    conversation = template.copy()
    texts = list(sample.turns)
    mark = DEFAULT_IMAGE_TOKEN
    if start_end and template.sep_style is not SeparatorStyle.PLAIN:
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    if "mmtag" in template.version:
        mark = f"<Image>{mark}</Image>"
    if template.sep_style is SeparatorStyle.PLAIN:
        # Captions: the image alone stands for the question, and the separator ends the caption.
        conversation = dataclasses.replace(conversation, sep="", sep2=template.sep)
        texts = _caption(sample)
    for index, text in enumerate(texts):
        if text.count(DEFAULT_IMAGE_TOKEN) == 1:
            text = _with_marks(text, 1)
        text = text.replace(DEFAULT_IMAGE_TOKEN, mark)
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


def tokenize_sample(
    sample: Sample, template: Conversation, tokenizer: Any, start_end: bool = False
) -> Tokens:
    """Tokenise a sample whose turns follow one another.

    Args:
        sample, template, start_end: as of `render`.
        tokenizer: of the model.

    Raises:
        UserInputError: see `render`; the tokenizer cannot say which tokens are learnt.
    """
    ids, labels = _tokenize_checked(sample, template, tokenizer, start_end)
    return Tokens(ids, labels, zeros_like(ids))


def tokenize_turns(
    sample: Sample, template: Conversation, tokenizer: Any, start_end: bool = False
) -> Tokens:
    """Tokenise a sample with images whose turns do not see one another.

    Every question follows all images as if it were the first one asked. What all prompts share, up
    to and with the last image mark, is there once and has turn 0; the turns 1, 2, ... follow. A
    last question without an answer has nothing to learn and is left out.

    Args, Raises: as of `tokenize_sample`.
    """
    count = len(sample.images)
    parts: list[Tokens] = []
    for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=False):
        alone = sample._replace(turns=(_with_marks(question, count), answer))
        ids, labels = _tokenize_checked(alone, template, tokenizer, start_end)
        shared = int((ids == IMAGE_TOKEN_INDEX).nonzero()[-1]) + 1
        if not parts:
            parts.append(Tokens(ids[:shared], labels[:shared], zeros_like(ids[:shared])))
        rest = ids[shared:]
        parts.append(Tokens(rest, labels[shared:], full_like(rest, len(parts))))
    return Tokens(*(cat(column) for column in zip(*parts, strict=True)))


def _tokenize_checked(
    sample: Sample, template: Conversation, tokenizer: Any, start_end: bool
) -> tuple[Tensor, Tensor]:
    """Return ids and labels of a sample, int64 `[L]`, of which nothing went wrong unnoticed.

    Raises:
        UserInputError: the tokenizer has no offsets, its ids are not those that the model gets
            outside of training, nothing is learnt, or no token ends an answer.
    """
    parts = render(sample, template, start_end)
    prompt = "".join(part.text for part in parts)
    try:
        ids, labels = tokenize(parts, tokenizer)
    except NotImplementedError:  # what transformers raises where there are no offsets
        raise _unlearnable(sample, prompt, "it does not say which text a token is of") from None
    if ids.tolist() != tokenizer_image_token(prompt, tokenizer):
        raise _unlearnable(sample, prompt, "with offsets it gives other ids than without")
    if any(part.learnt for part in parts) and bool((labels == IGNORE_INDEX).all()):
        raise _unlearnable(sample, prompt, "none of its tokens is of an answer")
    if template.sep2 == _END:
        ends = sum(part.text.count(_END) for part in parts if part.learnt)
        if labels.tolist().count(tokenizer.eos_token_id) < ends:
            raise _unlearnable(sample, prompt, f"{_END} ends an answer, and is no token of it")
    return ids, labels


def _unlearnable(sample: Sample, prompt: str, fault: str) -> UserInputError:
    """Return the error for a tokenizer that cannot make the labels of a sample."""
    shown = prompt if len(prompt) <= _SHOWN else f"...{prompt[-_SHOWN:]}"
    return UserInputError(
        f"{sample.name} cannot be learnt with this tokenizer: {fault}; use the tokenizer that was "
        f"made for the model, or another --version. The sample ends {shown!r}"
    )


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
