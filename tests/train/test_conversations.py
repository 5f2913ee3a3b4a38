"""Labels cover exactly the answers, whatever the tokenizer does at their borders."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.train.conversations import render, tokenize, tokenize_turns
from llava.train.tokenizer import make_tokenizer
from llava.utils import UserInputError

TEMPLATE = conv_templates["vicuna_v1"]
SAMPLE = {
    "id": "a",
    "image": "train/000000.png",
    "conversations": [
        {"from": "human", "value": "What color is the star?\n<image>"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "What does the blue sign say?"},
        {"from": "gpt", "value": "8AH3"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_image_mark_moves_to_the_front() -> None:
    prompt = render(SAMPLE, TEMPLATE)
    assert "USER: <image>\nWhat color is the star? ASSISTANT: red</s>USER: What" in prompt


def test_ids_equal_inference_and_labels_are_the_answers(tokenizer) -> None:
    prompt = render(SAMPLE, TEMPLATE)
    ids, labels = tokenize(prompt, TEMPLATE, tokenizer)
    assert ids.tolist() == tokenizer_image_token(prompt, tokenizer)
    assert int((ids == IMAGE_TOKEN_INDEX).sum()) == 1
    learnt = labels[labels != IGNORE_INDEX]
    assert tokenizer.decode(learnt) == "red</s> 8AH3</s>"
    assert (ids[labels != IGNORE_INDEX] == learnt).all()


def test_a_first_turn_by_the_model_is_dropped_and_roles_must_alternate() -> None:
    turns = [{"from": "gpt", "value": "hello"}, *SAMPLE["conversations"]]
    assert render({"conversations": turns}, TEMPLATE) == render(SAMPLE, TEMPLATE)
    with pytest.raises(UserInputError, match="alternate"):
        render({"id": "b", "conversations": turns[1:2] * 2}, TEMPLATE)


def test_byte_fallback_keeps_any_text(tokenizer) -> None:
    text = "naïve 漢字 {}~"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_turns_side_by_side_are_what_each_question_alone_would_be(tokenizer) -> None:
    ids, labels, turns = tokenize_turns(SAMPLE, TEMPLATE, tokenizer)
    questions = ["What color is the star?", "What does the blue sign say?"]
    for number, (question, answer) in enumerate(zip(questions, ["red", "8AH3"], strict=True), 1):
        conversation = TEMPLATE.copy()
        conversation.append_message(conversation.roles[0], f"<image>\n{question}")
        conversation.append_message(conversation.roles[1], answer)
        alone = tokenizer_image_token(conversation.get_prompt(), tokenizer)
        assert ids[(turns == 0) | (turns == number)].tolist() == alone
        learnt = labels[(turns == number) & (labels != IGNORE_INDEX)]
        assert tokenizer.decode(learnt) == f"{answer}</s>"
    assert turns.tolist() == sorted(turns.tolist())
    assert (labels[turns == 0] == IGNORE_INDEX).all()
