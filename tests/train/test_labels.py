"""Labels are those of LLaVA-1.5's rule, and right where the rule would drop a sample silently."""

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from label_rule import (
    GOLDENS,
    TEMPLATES,
    TINY,
    has_bos,
    labels_by_rule,
    make_tokenizer,
    vicuna_like,
)

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.train.conversations import render, tokenize_sample
from llava.train.samples import Sample
from llava.utils import UserInputError

WORDS = [
    *("red", "What color is the star?", "2024", "3.14159", "(a) 5%", "x", "yes.", "upper left"),
    *(
        "naïve",
        "漢字",
        "🧑‍🚀",
        "e\u0301",
        "\u00a0",
        "▁",
        "a\nb",
        "\n",
        "tab\there",
        "  two  spaces  ",
    ),
    *("", " ", "USER", "ASSISTANT", "[INST]", ":", "###", "long " * 60),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`load(model, legacy, bos)`: the tokenizer of a `tokenizer.model`, made once."""

    @cache
    def loaded(model: bytes, legacy: bool, bos: bool = True) -> Any:
        return make_tokenizer(model, legacy, tmp_path_factory.mktemp("t") / "made", bos)

    return loaded


def tiny() -> bytes:
    return (TINY / "tokenizer.model").read_bytes()


def text(chooser: random.Random) -> str:
    words = (chooser.choice(WORDS) for _ in range(chooser.randint(1, 5)))
    return "".join(word + chooser.choice(["", " ", " "]) for word in words)


def chat(chooser: random.Random, key: str) -> Sample:
    """Make up a sample that fits the template, with any number of images."""
    if key == "plain":
        return Sample("a chat", ("<image>", text(chooser) or "red"), ("a",))
    turns: list[str] = []
    for number in range(chooser.randint(1, 4)):
        asked, told = text(chooser), text(chooser)
        shown = chooser.choice([0, 1, 1, 2] if number == 0 else [0, 0, 0, 1])
        if shown == 1:
            asked = chooser.choice([f"<image>\n{asked}", f"{asked}\n<image>"])
        elif shown:
            asked = f"<image> and <image>{asked}"
        turns += [asked or "Who?", told or "I."]
    return Sample("a chat", tuple(turns), ("a",) * "".join(turns).count("<image>"))


def both(sample: Sample, key: str, tokenizer: Any) -> tuple[list[int], list[int], bool]:
    """Our labels of a sample, the rule's, and whether the rule's lengths added up."""
    template = conv_templates[key]
    prompt = "".join(part.text for part in render(sample, template))
    ours = tokenize_sample(sample, template, tokenizer).labels.tolist()
    return ours, *labels_by_rule(prompt, template, tokenizer)


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@pytest.mark.parametrize("key", TEMPLATES)
def test_labels_are_those_of_the_rule(key: str, legacy: bool, load: Callable[..., Any]) -> None:
    tokenizer = load(vicuna_like(tiny()), legacy, has_bos(key, legacy))
    chooser = random.Random(0)
    for _ in range(40):
        sample = chat(chooser, key)
        ours, rules, fits = both(sample, key, tokenizer)
        assert fits and ours == rules, sample
        assert any(label != IGNORE_INDEX for label in ours)


@pytest.mark.parametrize("case", json.loads(GOLDENS.read_text(encoding="utf-8")), ids=str)
def test_recorded_labels(case: dict[str, Any], load: Callable[..., Any]) -> None:
    """Written by the rule (`label_rule.py`), so that both cannot change together unnoticed."""
    tokenizer = load(vicuna_like(tiny()), case["legacy"], case["bos"])
    turns = tuple(case["turns"])
    sample = Sample("recorded", turns, ("a",) * "".join(turns).count("<image>"))
    ids, labels, _ = tokenize_sample(sample, conv_templates[case["template"]], tokenizer)
    assert ids.tolist() == case["ids"]
    wanted = [IGNORE_INDEX] * len(ids)
    for index in case["learnt"]:
        wanted[index] = case["ids"][index]
    assert labels.tolist() == wanted


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@pytest.mark.parametrize("key", TEMPLATES)
def test_llava15s_own_tokenizer(key: str, legacy: bool, load: Callable[..., Any]) -> None:
    """It may not be copied into the project."""
    place = os.environ.get("LLAVA_TOKENIZER_GOLDENS")
    if not place:
        pytest.skip("set LLAVA_TOKENIZER_GOLDENS to a folder with LLaVA-1.5's tokenizer and ids")
    model = Path(place, "tokenizer.model").read_bytes()
    tokenizer = load(model, legacy, has_bos(key, legacy))
    chooser = random.Random(1)
    for _ in range(40):
        ours, rules, fits = both(chat(chooser, key), key, tokenizer)
        assert fits and ours == rules


# What the rule loses: all labels of these samples, with a line in the log. key, legacy, turns, and
# how many answers there are to learn.
LOST = {
    "a last question without an answer": ("v1", True, ("a?", "red", "b?"), 1),
    "the template's mark in an answer": ("v1", True, ("a?", "red </s> blue", "b?", "two"), 2),
    "the opening mark in a question": ("v1", True, ("Say ASSISTANT: no", "no"), 1),
    "the end mark in a question": ("llama_2", True, ("a</s>b", "red", "c?", "two"), 2),
    "the unknown token, which pads": ("v1", True, ("a<unk>?", "red"), 1),
    "a mark of ChatML in a question": ("mpt", False, ("a<|im_end|>?", "red"), 1),
    "ChatML behind BOS, with legacy": ("chatml_direct", True, ("a?", "red", "b?", "two"), 2),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_rule_loses_is_learnt(name: str, load: Callable[..., Any]) -> None:
    key, legacy, turns, answers = LOST[name]
    ours, rules, fits = both(Sample("s", turns), key, load(vicuna_like(tiny()), legacy))
    assert not fits and set(rules) == {IGNORE_INDEX}
    starts = [i for i, label in enumerate(ours) if label >= 0 and ours[i - 1] == IGNORE_INDEX]
    assert len(starts) == answers


@pytest.mark.parametrize("key", ["v1", "mistral_instruct"])
def test_tokenizers_that_the_rule_does_not_know(key: str, load: Callable[..., Any]) -> None:
    """llava-tiny's has one piece more for a word that stands behind `</s>`, not one less."""
    turns = ("a?", "red", "b?", "two")
    new, rules, fits = both(Sample("s", turns), key, load(tiny(), False))
    assert not fits and set(rules) == {IGNORE_INDEX}
    old, rules, fits = both(Sample("s", turns), key, load(tiny(), True))
    assert fits and old == rules
    assert [label for label in new if label >= 0] == [label for label in old if label >= 0]


class Changed:
    """A tokenizer of which something is not as it should be."""

    def __init__(self, tokenizer: Any, change: Callable[..., Any], **attributes: Any) -> None:
        self.tokenizer, self.change = tokenizer, change
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.change(self.tokenizer(text, **options), options)


def no_offsets(encoded: Any, options: dict[str, Any]) -> Any:
    if options:
        raise NotImplementedError("return_offset_mapping is not available")
    return encoded


def empty_offsets(encoded: Any, options: dict[str, Any]) -> Any:
    if options:
        encoded["offset_mapping"] = [(0, 0) for _ in encoded["offset_mapping"]]
    return encoded


def other_ids(encoded: Any, options: dict[str, Any]) -> Any:
    if options:
        encoded["input_ids"] = [5] * len(encoded["input_ids"])
    return encoded


@pytest.mark.parametrize(
    ("change", "attributes", "fault"),
    [
        (no_offsets, {}, "it does not say which text a token is of"),
        (empty_offsets, {}, "none of its tokens is of an answer"),
        (other_ids, {}, "with offsets it gives other ids than without"),
        (lambda encoded, _: encoded, {"eos_token_id": 7}, "</s> ends an answer, and is no token"),
        (lambda encoded, _: encoded, {"eos_token_id": None}, "</s> ends an answer, and is no"),
    ],
)
def test_a_tokenizer_that_cannot_make_labels_is_an_error_that_shows_the_sample(
    change: Callable[..., Any],
    attributes: dict[str, Any],
    fault: str,
    load: Callable[..., Any],
) -> None:
    tokenizer = Changed(load(tiny(), False), change, **attributes)
    sample = Sample("sample 'x' (number 3)", ("<image>\nWhich star?", "the red one"), ("a",))
    with pytest.raises(
        UserInputError, match=r"^sample 'x' \(number 3\) cannot be learnt"
    ) as caught:
        tokenize_sample(sample, conv_templates["v1"], tokenizer)
    assert fault in str(caught.value) and "Which star? ASSISTANT: the red one" in str(caught.value)
    assert "\n" not in str(caught.value)
