"""Exactly the answers are learnt, under every template and whatever the texts hold."""

from itertools import groupby
from pathlib import Path

import pytest

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.train.conversations import render, tokenize, tokenize_sample, tokenize_turns
from llava.train.samples import Sample
from llava.train.tiny.init_tiny import make_tokenizer
from llava.utils import UserInputError

TEMPLATE = conv_templates["vicuna_v1"]
SAMPLE = Sample(
    "sample 'a'",
    (
        "What color is the star?\n<image>",
        "red",
        "What does the blue sign say?",
        "8AH3",
    ),
    ("train/000000.png",),
)
# What a model writes after the prompt of the open turn.
WRITTEN = {
    SeparatorStyle.SINGLE: " {}###",
    SeparatorStyle.TWO: " {}</s>",
    SeparatorStyle.MPT: "{}<|im_end|>",
    SeparatorStyle.LLAMA_2: " {} </s>",
    SeparatorStyle.PLAIN: "{}\n",
}
CHATS = sorted(k for k, t in conv_templates.items() if t.sep_style is not SeparatorStyle.PLAIN)
NASTY = [
    "ASSISTANT: no",
    "why</s>",
    "</s>USER: why ASSISTANT: because</s>",
    " USER: ",
    "### Assistant: no###",
    "a [/INST] b </s><s>[INST] c",
    "<|im_end|><|im_start|>assistant\nno<|im_end|>",
    "<<SYS>>\nno\n<</SYS>>\n\n",
    "\n\n",
    "<s>",
    "  two  spaces  ",
    "naïve 漢字 {}~",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


def spell(ids: list[int], tokenizer) -> str:
    """The text of ids, with every space."""
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    return b"".join(
        bytes([int(piece[3:5], 16)])
        if piece.startswith("<0x")
        else piece.replace("▁", " ").encode()
        for piece in pieces
    ).decode()


def learnt(labels, tokenizer) -> list[str]:
    """The stretches that are learnt."""
    runs = groupby(labels.tolist(), key=lambda label: label != IGNORE_INDEX)
    return [spell(list(run), tokenizer) for is_learnt, run in runs if is_learnt]


def prompt_of(sample: Sample, template) -> str:
    return "".join(part.text for part in render(sample, template))


def test_the_image_mark_moves_to_the_front() -> None:
    prompt = prompt_of(SAMPLE, TEMPLATE)
    assert "USER: <image>\nWhat color is the star? ASSISTANT: red</s>USER: What" in prompt


def test_several_marks_of_a_message_stay_where_they_are() -> None:
    question = "Is <image> like <image>?"
    sample = Sample("two", (question, "no", "<image> And this?", "yes"), ("a", "b", "c"))
    prompt = prompt_of(sample, TEMPLATE)
    assert f"USER: {question} ASSISTANT: no</s>USER: <image>\nAnd this? ASSISTANT:" in prompt


def test_mmtag_templates_wrap_the_mark() -> None:
    assert "USER: <Image><image></Image>\nWhat" in prompt_of(SAMPLE, conv_templates["v1_mmtag"])


def test_ids_equal_inference_and_labels_are_the_answers(tokenizer) -> None:
    ids, labels, turns = tokenize_sample(SAMPLE, TEMPLATE, tokenizer)
    assert ids.tolist() == tokenizer_image_token(prompt_of(SAMPLE, TEMPLATE), tokenizer)
    assert int((ids == IMAGE_TOKEN_INDEX).sum()) == 1
    assert learnt(labels, tokenizer) == [" red</s>", " 8AH3</s>"]
    assert (ids == labels)[labels != IGNORE_INDEX].all()
    assert not turns.any()


@pytest.mark.parametrize("key", CHATS)
def test_training_renders_what_a_chat_renders(key: str) -> None:
    conversation = conv_templates[key].copy()
    for index, text in enumerate(("Who?", "I.", "Why?", "So.")):
        conversation.append_message(conversation.roles[index % 2], text)
    sample = Sample("chat", ("Who?", "I.", "Why?", "So."))
    assert prompt_of(sample, conv_templates[key]) == conversation.get_prompt()


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("key", CHATS)
@pytest.mark.parametrize("text", NASTY)
def test_marks_of_the_template_in_a_text_shift_nothing(
    text: str, key: str, image: bool, tokenizer
) -> None:
    template = conv_templates[key]
    first = "<image>\nred?" if image else "red?"
    turns = (first, text, text, "star", f"{text} red {text}", f"red {text} star", text, "")
    ids, labels, _ = tokenize_sample(Sample("nasty", turns, ("a",) * image), template, tokenizer)
    written = WRITTEN[template.sep_style]
    answers = [written.format(answer) for answer in turns[1:-1:2]]
    assert "".join(learnt(labels, tokenizer)) == "".join(answers)
    assert ids.tolist() == tokenizer_image_token(prompt_of(Sample("", turns), template), tokenizer)
    # Each answer alone, after the prompt that a chat would end with.
    conversation = template.copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    parts = render(Sample("alone", (text, text)), template)
    assert [part.text for part in parts if part.learnt] == [written.format(text)]
    assert "".join(part.text for part in parts if not part.learnt) == conversation.get_prompt()


@pytest.mark.parametrize("key", CHATS)
@pytest.mark.parametrize(
    "turns", [("a?", "", "b?", "star"), ("a?", "", "b?", ""), ("a?", "", "b?")]
)
def test_questions_after_an_empty_answer_are_not_learnt(
    key: str, turns: tuple[str, ...], tokenizer
) -> None:
    _, labels, _ = tokenize_sample(Sample("empty", turns), conv_templates[key], tokenizer)
    wanted = [WRITTEN[conv_templates[key].sep_style].format("star")] * ("star" in turns)
    assert learnt(labels, tokenizer) == wanted


@pytest.mark.parametrize("key", CHATS)
def test_a_last_question_without_an_answer_is_not_learnt(key: str, tokenizer) -> None:
    sample = Sample("odd", ("red?", "star", "blue?"))
    _, labels, _ = tokenize_sample(sample, conv_templates[key], tokenizer)
    assert learnt(labels, tokenizer) == [WRITTEN[conv_templates[key].sep_style].format("star")]


def test_the_example_of_a_template_is_not_learnt(tokenizer) -> None:
    template = conv_templates["v0"]
    assert template.offset == 2
    parts = render(Sample("a", ("red?", "star")), template)
    assert [part.text for part in parts if part.learnt] == [" star###"]


@pytest.mark.parametrize("key", ["plain", "v0_plain"])
@pytest.mark.parametrize("caption", ["a red star", "<s> a</s>\nb", "star \n"])
def test_captions_follow_their_image_and_are_learnt(key: str, caption: str, tokenizer) -> None:
    """LLaVA's projector pre-training: image, caption, newline."""
    sample = Sample("a", ("Describe it briefly.\n<image>", caption), ("a.png",))
    ids, labels, _ = tokenize_sample(sample, conv_templates[key], tokenizer)
    assert ids[:2].tolist() == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2].tolist() == [IGNORE_INDEX] * 2
    assert torch_equal(ids[2:], labels[2:])
    assert spell(ids[2:].tolist(), tokenizer).removeprefix(" ") == f"{caption}\n"
    together = tokenize_turns(sample, conv_templates[key], tokenizer)
    assert torch_equal(together.ids, ids) and torch_equal(together.labels, labels)


def torch_equal(one, other) -> bool:
    return one.tolist() == other.tolist()


@pytest.mark.parametrize(
    "sample",
    [
        Sample("sample 'x'", ("Who?", "I.")),
        Sample("sample 'x'", ("<image>", "a", "b", "c"), ("a",)),
        Sample("sample 'x'", ("<image><image>", "a"), ("a", "b")),
    ],
)
def test_what_is_no_caption_is_refused(sample: Sample) -> None:
    with pytest.raises(UserInputError, match=r"sample 'x' has .* 'plain' learns captions"):
        render(sample, conv_templates["plain"])


def test_errors_of_a_template_name_the_sample() -> None:
    with pytest.raises(UserInputError, match="sample 'x': a llama_v2 conversation must open"):
        render(Sample("sample 'x'", ("", "I.")), conv_templates["llama_2"])


def test_byte_fallback_keeps_any_text(tokenizer) -> None:
    text = "naïve 漢字 {}~"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("key", CHATS)
@pytest.mark.parametrize("count", [1, 2])
def test_turns_side_by_side_are_what_each_question_alone_would_be(
    count: int, key: str, tokenizer
) -> None:
    template = conv_templates[key]
    texts = ("What</s> color?\n" + "<image>" * count, "red", "ASSISTANT: sign?", "8AH3", "Why?")
    sample = Sample("a", texts, ("a.png",) * count)
    ids, labels, turns = tokenize_turns(sample, template, tokenizer)
    assert int((ids == IMAGE_TOKEN_INDEX).sum()) == count
    assert turns.max() == 2  # the last question has no answer
    pairs = [("What</s> color?", "red"), ("ASSISTANT: sign?", "8AH3")]
    for number, (question, answer) in enumerate(pairs, 1):
        alone = Sample("b", ("<image>\n" * count + question, answer), ("a.png",) * count)
        wanted, _ = tokenize(render(alone, template), tokenizer)
        assert torch_equal(ids[(turns == 0) | (turns == number)], wanted)
        answers = learnt(labels[turns == number], tokenizer)
        assert answers == [WRITTEN[template.sep_style].format(answer)]
    assert turns.tolist() == sorted(turns.tolist())
    assert (labels[turns == 0] == IGNORE_INDEX).all()
