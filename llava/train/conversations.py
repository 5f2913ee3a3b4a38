"""LLaVA's training conversations: JSON samples to token ids and labels."""

from typing import Any

from torch import Tensor, cat, full_like, tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.utils import UserInputError

_ROLE = {"human": 0, "gpt": 1}


def render(sample: dict[str, Any], template: Conversation) -> str:
    """The prompt text of one sample under ``template``.

    ``<image>`` moves to the start of its message, a first turn by ``gpt`` is dropped.

    Raises:
        UserInputError: roles that do not alternate, or an unknown speaker.
    """
    conversation = template.copy()
    turns = sample["conversations"]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    for index, turn in enumerate(turns):
        if _ROLE.get(turn["from"]) != index % 2:
            raise UserInputError(
                f"sample {sample.get('id')!r}: turn {index} is from {turn['from']!r}; "
                "turns must alternate between 'human' and 'gpt'"
            )
        text = turn["value"]
        if DEFAULT_IMAGE_TOKEN in text:
            text = DEFAULT_IMAGE_TOKEN + "\n" + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def answer_spans(prompt: str, template: Conversation) -> list[tuple[int, int]]:
    """Character ranges of ``prompt`` that are learnt: each answer with its end mark.

    Raises:
        UserInputError: for a template whose answers are not marked off by ``sep2``.
    """
    if template.sep_style is not SeparatorStyle.TWO:
        raise UserInputError(
            f"training with the template version {template.version!r} is not supported; use v1"
        )
    header = f"{template.roles[1]}:"
    spans, start = [], 0
    while (found := prompt.find(header, start)) >= 0:
        end = prompt.find(template.sep2, found)
        end = len(prompt) if end < 0 else end + len(template.sep2)
        spans.append((found + len(header), end))
        start = end
    return spans


def tokenize(prompt: str, template: Conversation, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids and labels of a rendered prompt, both int64 ``[L]``.

    Ids equal ``tokenizer_image_token``'s: every chunk between images is tokenised by itself, with
    one leading BOS. A label is the id where a token belongs to an answer, else ``IGNORE_INDEX``;
    spans come from character offsets, so no tokenizer version can shift them.
    """
    spans = answer_spans(prompt, template)
    ids: list[int] = []
    labels: list[int] = []
    offset = 0
    for index, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            offset += len(DEFAULT_IMAGE_TOKEN)
        encoded = tokenizer(chunk, return_offsets_mapping=True)
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        if index and pairs and pairs[0][0] == tokenizer.bos_token_id:
            pairs = pairs[1:]
        for token, (start, end) in pairs:
            learnt = any(
                start + offset < stop and end + offset > first and end > start
                for first, stop in spans
            )
            ids.append(token)
            labels.append(token if learnt else IGNORE_INDEX)
        offset += len(chunk)
    return tensor(ids), tensor(labels)


def tokenize_turns(
    sample: dict[str, Any], template: Conversation, tokenizer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and turn numbers of a sample with an image whose turns stand side by side.

    Every question follows the image as if it were the first one asked. What all prompts share, up
    to and with the image mark, stands once and has turn 0; the turns 1, 2, ... follow. All three
    are int64 ``[L]``.
    """
    messages = sample["conversations"]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for human, answer in zip(messages[::2], messages[1::2], strict=True):
        question = human["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        human = human | {"value": f"{DEFAULT_IMAGE_TOKEN}\n{question}"}
        alone = sample | {"conversations": [human, answer]}
        ids, labels = tokenize(render(alone, template), template, tokenizer)
        shared = int((ids == IMAGE_TOKEN_INDEX).nonzero()) + 1
        if not parts:
            parts.append((ids[:shared], labels[:shared], full_like(ids[:shared], 0)))
        rest = ids[shared:]
        parts.append((rest, labels[shared:], full_like(rest, len(parts))))
    ids, labels, turns = (cat(column) for column in zip(*parts, strict=True))
    return ids, labels, turns
