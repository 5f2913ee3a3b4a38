"""Read the samples of LLaVA's training data, checked before anything is trained."""

import json
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.utils import UserInputError, user_path
from llava.value_rules import check_characters

_SPEAKERS = ("human", "gpt")


class Sample(NamedTuple):
    """One conversation.

    Attributes:
        name: what errors call it.
        turns: what user and model say in turn, the user first.
        images: file names, one for each `<image>` mark of the turns.
    """

    name: str
    turns: tuple[str, ...]
    images: tuple[str, ...] = ()


def read_samples(path: str, faults: dict[str, str] | None = None) -> list[Sample]:
    """Read all samples of a file.

    Args:
        path: of the file.
        faults: gets what is wrong with each sample that cannot be used, by its name; these are
            left out. None makes the first of them an error.

    Raises:
        UserInputError: the file is missing, or not a JSON array of LLaVA's samples; see
            `parse_sample`.
    """
    fault = f"cannot read --data_path {path}"
    try:
        text = user_path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{fault}: it is not UTF-8 text ({error}); save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise UserInputError(f"{fault}: {error}; check the path") from error
    try:
        samples = json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = "it must be one JSON array of samples"
        if _is_json_lines(text):
            advice = "it has one JSON object a line; put all of them into one array: [{...}, {...}]"
        raise UserInputError(f"{fault}: {advice} ({error})") from error
    if not isinstance(samples, list) or not samples:
        held = "an empty array" if samples == [] else _kind(samples)
        raise UserInputError(
            f"--data_path {path} holds {held}; give a JSON array of samples: "
            '[{"id": ..., "image": ..., "conversations": [...]}, ...]'
        )
    read = []
    for number, sample in enumerate(samples):
        try:
            read.append(parse_sample(sample, number))
        except UserInputError as error:
            if faults is None:
                raise
            faults[name_of(sample, number)] = str(error)
    if not read:
        raise UserInputError(
            f"--data_path {path} has no sample that can be used; the first: "
            f"{next(iter((faults or {}).values()))}"
        )
    return read


def name_of(sample: Any, number: int) -> str:
    """Return what errors call a sample in its JSON form, `number` being its place from 0."""
    if isinstance(sample, dict) and "id" in sample:
        return f"sample {sample['id']!r} (number {number + 1})"
    return f"sample number {number + 1}"


def parse_sample(sample: Any, number: int = 0) -> Sample:
    """Read one sample from its JSON form `{"id", "image", "conversations"}`.

    `image` may be a file name, a list of them, or missing or null where there is none. A first
    turn by the model is dropped, as in LLaVA; a last question may lack an answer.

    Args:
        sample: as json.loads gives it.
        number: its place in the file, counted from 0.

    Raises:
        UserInputError: names the sample, what is wrong with it and what would be right.
    """
    name = name_of(sample, number)
    if not isinstance(sample, dict):
        raise UserInputError(f"{name} is {_kind(sample)}; give an object with 'conversations'")
    turns = _turns(sample.get("conversations"), name)
    images = _images(sample.get("image"), name)
    marks = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in turns)
    if marks != len(images):
        raise UserInputError(
            f"{name} has {marks} <image> marks and {len(images)} images; write exactly one mark "
            "for each image"
        )
    return Sample(name, turns, images)


def _turns(said: Any, name: str) -> tuple[str, ...]:
    form = 'give a list of {"from": "human" or "gpt", "value": text}'
    if not isinstance(said, list) or not said:
        what = "is missing" if said is None else "is empty" if said == [] else f"is {_kind(said)}"
        raise UserInputError(f"{name}: 'conversations' {what}; {form}")
    texts = []
    first = 0
    for index, turn in enumerate(said):
        if not isinstance(turn, dict):
            raise UserInputError(f"{name}: turn {index} is {_kind(turn)}; {form}")
        speaker, text = turn.get("from"), turn.get("value")
        if index == 0 and speaker == "gpt":
            first = 1
        if speaker != _SPEAKERS[(index - first) % 2]:
            raise UserInputError(
                f"{name}: turn {index} is from {speaker!r}; turns must alternate between 'human' "
                "and 'gpt'"
            )
        if not isinstance(text, str):
            raise UserInputError(
                f"{name}: the value of turn {index} is {_kind(text)}; write it as text in quotes"
            )
        check_characters(text, f"{name}: turn {index}")
        if speaker == "gpt" and index and DEFAULT_IMAGE_TOKEN in text:
            raise UserInputError(
                f"{name}: turn {index} is from 'gpt' and has an <image> mark; move the mark to a "
                "turn from 'human'"
            )
        texts.append(text)
    texts = texts[first:]
    if not any(texts[1::2]):
        raise UserInputError(
            f"{name} has no answer to learn: no question of it is answered by 'gpt'; add an "
            "answer, or leave the sample out"
        )
    return tuple(texts)


def _images(given: Any, name: str) -> tuple[str, ...]:
    names = given if isinstance(given, list) else [] if given is None else [given]
    for image in names:
        if not isinstance(image, str) or not image:
            what = "empty" if image == "" else _kind(image)
            raise UserInputError(
                f"{name}: 'image' is {what}; give a file name, a list of file names, or leave it "
                "out where there is no image"
            )
        check_characters(image, f"{name}: 'image'")
    return tuple(names)


def _is_json_lines(text: str) -> bool:
    lines = text.strip().splitlines()
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        return False


def _kind(value: Any) -> str:
    """Return what JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
