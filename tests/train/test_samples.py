"""Every sample is right, or one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.train.samples import Sample, parse_sample, read_samples
from llava.utils import UserInputError

HUMAN, GPT = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}
SHOWN = {"from": "human", "value": "<image>\nWho?"}


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        ({"conversations": [HUMAN, GPT]}, (("Who?", "I."), ())),
        ({"conversations": [GPT, HUMAN, GPT]}, (("Who?", "I."), ())),
        ({"conversations": [HUMAN, GPT, HUMAN]}, (("Who?", "I.", "Who?"), ())),
        ({"image": None, "conversations": [HUMAN, GPT]}, (("Who?", "I."), ())),
        ({"image": [], "conversations": [HUMAN, GPT]}, (("Who?", "I."), ())),
        ({"image": "a.png", "conversations": [SHOWN, GPT]}, (("<image>\nWho?", "I."), ("a.png",))),
        ({"image": ["a.png"], "conversations": [SHOWN, GPT]}, ((SHOWN["value"], "I."), ("a.png",))),
        (
            {"image": ["a", "b"], "conversations": [SHOWN, GPT, SHOWN, GPT]},
            ((SHOWN["value"], "I.") * 2, ("a", "b")),
        ),
        (
            {"conversations": [HUMAN, {**GPT, "value": ""}, HUMAN, GPT]},
            (("Who?", "", "Who?", "I."), ()),
        ),
        ({"conversations": [{**HUMAN, "weight": 1}, GPT], "other": 5}, (("Who?", "I."), ())),
    ],
)
def test_forms_of_samples(sample: dict[str, Any], wanted: tuple) -> None:
    parsed = parse_sample({"id": 7, **sample}, number=3)
    assert parsed == Sample("sample 7 (number 4)", *wanted)


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        ({}, "'conversations' is missing"),
        ({"conversations": None}, "'conversations' is missing"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": "hi"}, "'conversations' is text"),
        ({"conversations": {"from": "human"}}, "'conversations' is an object"),
        ({"conversations": [HUMAN, "I."]}, "turn 1 is text"),
        ({"conversations": [None]}, "turn 0 is null"),
        ({"conversations": [HUMAN, HUMAN]}, "turn 1 is from 'human'; turns must alternate"),
        ({"conversations": [GPT, GPT]}, "turn 1 is from 'gpt'; turns must alternate"),
        ({"conversations": [{**HUMAN, "from": "system"}, HUMAN, GPT]}, "turn 0 is from 'system'"),
        ({"conversations": [{**HUMAN, "from": ["human"]}, GPT]}, r"turn 0 is from \['human'\]"),
        ({"conversations": [{"value": "Who?"}, GPT]}, "turn 0 is from None"),
        ({"conversations": [HUMAN, {**GPT, "value": None}]}, "value of turn 1 is null"),
        ({"conversations": [HUMAN, {**GPT, "value": 3}]}, "value of turn 1 is a number"),
        ({"conversations": [HUMAN, {**GPT, "value": True}]}, "value of turn 1 is a boolean"),
        ({"conversations": [HUMAN, {**GPT, "value": ["a"]}]}, "value of turn 1 is a list"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "value of turn 1 is null"),
        (
            {"conversations": [HUMAN, {**GPT, "value": "a\ud800"}]},
            "turn 1 has .* not a character",
        ),
        ({"conversations": [HUMAN]}, "no answer to learn"),
        ({"conversations": [GPT]}, "no answer to learn"),
        ({"conversations": [HUMAN, {**GPT, "value": ""}]}, "no answer to learn"),
        ({"image": "a", "conversations": [HUMAN, GPT]}, "0 <image> marks and 1 images"),
        ({"image": "a", "conversations": [SHOWN, GPT, SHOWN, GPT]}, "2 <image> marks and 1 images"),
        ({"image": ["a", "b"], "conversations": [SHOWN, GPT]}, "1 <image> marks and 2 images"),
        ({"conversations": [SHOWN, GPT]}, "1 <image> marks and 0 images"),
        ({"image": "a", "conversations": [HUMAN, {**GPT, "value": "<image>"}]}, "from 'gpt' and"),
        ({"image": 5, "conversations": [SHOWN, GPT]}, "'image' is a number"),
        ({"image": "", "conversations": [SHOWN, GPT]}, "'image' is empty"),
        ({"image": {"path": "a"}, "conversations": [SHOWN, GPT]}, "'image' is an object"),
        ({"image": ["a", None], "conversations": [SHOWN, GPT]}, "'image' is null"),
        (
            {"image": "\ud800.png", "conversations": [SHOWN, GPT]},
            "'image' has .* not a character",
        ),
    ],
)
def test_faults_name_the_sample(sample: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserInputError, match=rf"^sample 'x' \(number 2\).*{fault}") as caught:
        parse_sample({"id": "x", **sample}, number=1)
    assert "\n" not in str(caught.value)


def test_a_sample_without_an_id_is_named_by_its_number() -> None:
    with pytest.raises(UserInputError, match=r"^sample number 1: 'conversations' is missing"):
        parse_sample({})
    with pytest.raises(UserInputError, match=r"^sample number 1 is a list"):
        parse_sample([])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "one JSON array"),
        (b"[]", "holds an empty array"),
        (b"{}", "holds an object"),
        (b"null", "holds null"),
        (b'"text"', "holds text"),
        (b"[1, 2", "one JSON array"),
        (b'{"id": 1}\n{"id": 2}\n', "one JSON object a line"),
        (b"\xff\xfe[\x00", "save it as UTF-8"),
        (b"[" * 100_000, "one JSON array"),
    ],
)
def test_faults_of_a_file_are_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=fault) as caught:
        read_samples(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "missing.json", "a\0b"])
def test_what_is_no_file_is_one_line(path: str) -> None:
    with pytest.raises(UserInputError, match="cannot read --data_path"):
        read_samples(path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": [HUMAN, GPT]}]), encoding="utf-8-sig")
    assert read_samples(str(path)) == [Sample("sample number 1", ("Who?", "I."))]
