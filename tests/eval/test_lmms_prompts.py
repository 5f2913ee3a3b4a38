"""What requests of lmms-eval ask: pictures where they stand, and the decoding of its `llava`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.eval.lmms_inputs import (
    Prompt,
    batch_size_of,
    device_of,
    dtype_of,
    join,
    pictures_of,
    read_messages,
)
from llava.mm_utils import tokenizer_image_token
from llava.model.loaded import LoadedModel
from llava.model.prompting import render
from llava.sampling import Sampling
from llava.utils import UserInputError

PICTURE = Image.new("RGB", (4, 4))
SHOWN = {"type": "image", "url": PICTURE}
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant "
SYSTEM += "gives helpful, detailed, and polite answers to the user's questions."


def message(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A chat message; text parts are given as text, pictures as None."""
    content = [
        SHOWN if part is None else {"type": "text", "text": part} if isinstance(part, str) else part
        for part in parts
    ]
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("parts", "text", "words"),
    [
        (
            ["Each row of", None, "shows one year."],
            "Each row of <image> shows one year.",
            "Each row of shows one year.",
        ),
        ([None, "What is it?"], "<image>\nWhat is it?", "What is it?"),
        ([None, "\nWhat is it?"], "<image>\n\nWhat is it?", "What is it?"),
        ([None, None, "The same?"], "<image> <image>\nThe same?", "The same?"),
        ([None, "and", None, "differ?"], "<image>\nand <image> differ?", "and differ?"),
        (["What is", None], "What is <image>", "What is"),
        (["What is:\n", None], "What is:\n<image>", "What is:"),
        (["a ", None, "\tb"], "a <image>\tb", "a b"),
        (["a  ", None, "  b"], "a  <image>  b", "a b"),
        (["a", None, None, "b"], "a <image> <image> b", "a b"),
        (["a", None, "", None, "b"], "a <image> <image> b", "a b"),
        (["", None, "b"], "<image>\nb", "b"),
        (["Look:", "", "what is it?"], "Look: what is it?", "Look: what is it?"),
        (["One.\n", "Two."], "One.\nTwo.", "One.\nTwo."),
        ([None], "<image>\n", ""),
    ],
)
def test_pictures_stand_where_the_message_shows_them(
    parts: list[str | None], text: str, words: str
) -> None:
    prompt = read_messages([message(*parts)], {}, "demo")
    assert prompt.marked == join(parts) == text
    assert prompt.words == words
    assert len(prompt.images) == parts.count(None) == text.count("<image>")
    assert render(prompt.dialogue, "vicuna_v1") == f"{SYSTEM} USER: {text} ASSISTANT:"


def test_a_content_may_be_one_text() -> None:
    prompt = read_messages([{"role": "user", "content": "What?"}], {}, "demo")
    assert (prompt.marked, prompt.images) == ("What?", ())


TALK = [
    message("Be short.", role="system"),
    message("Is", None, "red?"),
    message("Yes, ", "it is.", role="assistant"),
    message(None, "And this?"),
]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (
            "vicuna_v1",
            "Be short. USER: Is <image> red? ASSISTANT: Yes, it is.</s>"
            "USER: <image>\nAnd this? ASSISTANT:",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nBe short.<|im_end|><|im_start|>user\nIs <image> red?<|im_end|>"
            "<|im_start|>assistant\nYes, it is.<|im_end|><|im_start|>user\n<image>\nAnd this?"
            "<|im_end|><|im_start|>assistant\n",
        ),
        (
            "mistral_instruct",
            "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nIs <image> red? [/INST] Yes, it is. </s>"
            "[INST] <image>\nAnd this? [/INST]",
        ),
    ],
)
def test_a_history_and_a_system_message(template: str, rendered: str) -> None:
    own = conv_templates[template].get_prompt()
    prompt = read_messages(TALK, {}, "demo")
    assert render(prompt.dialogue, template) == rendered
    assert len(prompt.images) == 2
    assert prompt.words == "And this?"
    assert conv_templates[template].get_prompt() == own, "the template itself was changed"


def test_a_mark_that_somebody_wrote_is_text(subject: LoadedModel) -> None:
    """In messages everywhere; in a simple request where there is no picture to stand for."""
    written = "What does <image> mean"
    talk = [
        message("Never say <image>.", role="system"),
        message(written, None, "<image>?"),
        message("A <image>.", role="assistant"),
        message("<image>"),
    ]
    tokenizer = subject.tokenizer
    prompt = read_messages(talk, {}, "demo")
    ids = subject.row(prompt.dialogue).tolist()
    assert ids.count(IMAGE_TOKEN_INDEX) == len(prompt.images) == 1
    place = ids.index(IMAGE_TOKEN_INDEX)
    for part, copies in ((ids[:place], 2), (ids[place + 1 :], 3)):
        assert tokenizer.decode(part).count("<image>") == copies
    assert prompt.words == "<image>"
    alone = Prompt(written, (), {})
    assert tokenizer.decode(subject.row(alone.dialogue), skip_special_tokens=True).endswith(
        f"USER: {written} ASSISTANT:"
    )
    marked = Prompt("Is <image> red?", (PICTURE,), {})
    rendered = f"{SYSTEM} USER: Is <image> red? ASSISTANT:"
    assert subject.row(marked.dialogue).tolist() == tokenizer_image_token(rendered, tokenizer)
    assert Prompt("Red?", (PICTURE, PICTURE), {}).marked == "<image> <image>\nRed?"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "does not ask with chat messages"),
        ("What?", "does not ask with chat messages"),
        ([{"role": "user"}], "does not ask with chat messages"),
        ([{"role": "user", "content": None}], "does not ask with chat messages"),
        ([{"role": "user", "content": ["What?"]}], "does not ask with chat messages"),
        ([{"role": "user", "content": [{"text": "What?"}]}], "does not ask with chat messages"),
        ([], "in turns of no one"),
        ([message("a"), message("b")], "in turns of user, user"),
        ([message("a", role="assistant")], "in turns of assistant"),
        ([message("a"), message("b", role="assistant")], "in turns of user, assistant"),
        ([message("a"), message("b", role="system")], "in turns of user, system"),
        ([message("a", role="tool")], "in turns of tool"),
        ([message(None, role="system"), message("a")], "a picture in the system's turn"),
        ([message({"type": "video", "url": "a.mp4"})], "type 'video' that holds 'a.mp4'"),
        ([message({"type": "audio", "url": [1]})], "type 'audio' that holds list"),
        ([message({"type": "text", "text": None})], "type 'text' that holds NoneType"),
        ([message({"type": "image", "url": "a.png"})], "shows 'a.png'"),
        ([message({"type": "image", "url": None})], "shows NoneType"),
        ([message({"type": "image"})], "shows NoneType"),
    ],
)
def test_what_cannot_be_asked_is_one_line(messages: Any, named: str) -> None:
    with pytest.raises(UserInputError, match=f"^task demo .*{named}"):
        read_messages(messages, {}, "demo")


def test_visuals() -> None:
    for none in (None, [], (), [None]):
        assert pictures_of(none, "demo") == ()
    grey = Image.new("L", (4, 4))
    assert [image.mode for image in pictures_of([PICTURE, None, grey], "demo")] == ["RGB", "RGB"]


@pytest.mark.parametrize(
    ("visuals", "named"),
    [
        (["clip.mp4"], r"shows 'clip\.mp4'; llava_pruned takes pictures"),
        ([[PICTURE, PICTURE]], "shows list; llava_pruned takes pictures"),
        ([PICTURE, {"array": [0.0]}], "shows dict; llava_pruned takes pictures"),
        ("clip.mp4", r"shows 'clip\.mp4', not a list of pictures"),
        (PICTURE, "shows Image, not a list of pictures"),
    ],
)
def test_other_media_are_one_line(visuals: Any, named: str) -> None:
    with pytest.raises(UserInputError, match=f"^task demo {named}"):
        pictures_of(visuals, "demo")


DEFAULT = Sampling(temperature=0, top_p=None, num_beams=1, max_new_tokens=1024)
NULLS = dict.fromkeys(["temperature", "top_p", "num_beams", "max_new_tokens"])


@pytest.mark.parametrize(
    ("decoding", "sampling"),
    [
        ({}, DEFAULT),
        (NULLS, DEFAULT),
        ({"until": ["\n\n"], "do_sample": "maybe", "image_aspect_ratio": "pad"}, DEFAULT),
        ({"until": 3, "do_sample": True}, DEFAULT),
        ({"top_p": 0}, DEFAULT),
        ({"top_p": 7, "temperature": 0}, DEFAULT),
        ({"top_p": "most"}, DEFAULT),
        ({"temperature": -1, "top_p": 0.5}, DEFAULT),
        (
            {"num_beams": 2.0, "max_new_tokens": 16.0},
            Sampling(temperature=0, num_beams=2, max_new_tokens=16),
        ),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(0.7, 0.9, 1, 1024)),
        ({"temperature": 1, "top_p": 0}, Sampling(1, math.ulp(0.0), 1, 1024)),
        ({"temperature": 1, "top_p": None}, Sampling(1, None, 1, 1024)),
    ],
)
def test_decoding_settings(decoding: dict[str, Any], sampling: Sampling) -> None:
    assert Prompt("", (), decoding).sampling == sampling


@pytest.mark.parametrize(
    ("decoding", "named"),
    [
        ({"temperature": "0.2"}, "temperature must be a number of at least 0, got '0.2'"),
        ({"temperature": True}, "temperature must be a number of at least 0, got True"),
        ({"temperature": 1, "top_p": 2}, r"top_p must be a share in \(0, 1\], got 2"),
        ({"temperature": 1, "top_p": False}, "top_p must be a share"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
        ({"num_beams": 1.5}, "num_beams must be a whole number"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": math.inf}, "max_new_tokens must be a whole number"),
    ],
)
def test_decoding_settings_that_cannot_be_used(decoding: dict[str, Any], named: str) -> None:
    with pytest.raises(UserInputError, match=f"^{named}"):
        _ = Prompt("", (), decoding).sampling


def test_model_arguments() -> None:
    assert [batch_size_of(size) for size in (1, "8", 2.0)] == [1, 8, 2]
    for size in ("auto", "auto:4", None, 0, "-1", 1.5, [1], math.inf):
        with pytest.raises(UserInputError, match=r"^batch_size must be a whole number of at least"):
            batch_size_of(size)
    assert [dtype_of(name) for name in (None, "auto", "float16", "torch.bfloat16")] == [
        *(None, None, "float16", "bfloat16")
    ]
    for name in ("foo", "float64", "int8", "", 16):
        with pytest.raises(UserInputError, match=r"^unknown dtype .*; use auto, float16"):
            dtype_of(name)
    assert [device_of(name) for name in (None, "auto", "cpu", "cuda")] == [
        *("auto", "auto", "cpu", "cuda")
    ]
    for name in ("gpu", "cuda:99", "meta", "hpu", "", 99):
        with pytest.raises(UserInputError, match=r"unknown device .*; use auto, cpu"):
            device_of(name)
