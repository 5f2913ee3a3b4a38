"""MMMU: college questions with one to seven images, options or an open answer.

Options and open answers are read from free text as the official MMMU scripts do when lmms-eval runs
them, but for one thing: where no option can be read they draw one from the global random state, and
here it is drawn from the question's id. So a score does not depend on what was scored before.
"""

import ast
import hashlib
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    SHORT_ANSWER,
    Kind,
    as_json,
    index_by,
    is_id,
    read_jsonl,
    with_options,
)
from llava.eval.tasks.published import FolderBenchmark
from llava.storage import dump_json

DOMAINS = {
    "art_and_design": "Art Art_Theory Design Music",
    "business": "Accounting Economics Finance Manage Marketing",
    "science": "Biology Chemistry Geography Math Physics",
    "health_and_medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "humanities_and_social_science": "History Literature Sociology Psychology",
    "tech_and_engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
_DOMAIN_OF = {
    subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()
}
QUESTION_TYPES = ("multiple-choice", "open")
_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_IMAGE = re.compile(r"<image (\d+)>")
ROWS = Dataset(
    "lmms-lab/MMMU",
    "id question options answer question_type image_1 image_2 image_3 image_4 image_5 image_6 "
    "image_7",
    "validation",
)

FIELDS = {
    "id": Kind.ID,
    "question": Kind.TEXT,
    "options": Kind.ANY,
    "answer": Kind.ANY,
    "question_type": Kind.ANY,
}

Value = str | float

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")  # in this order, each once
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+|[,\d])"),  # 12, 1.2, .2
)


def parse_choice(text: str, options: Mapping[str, str], question_id: str) -> str:
    """Return the letter of `options` ({letter: option text}) that `text` gives.

    Looked for in this order, the first kind that is found decides: "(A)", "A ", "A.", and in
    answers of more than five words the text of an option. Of several options the last one is
    taken; without any, one drawn from `question_id`.
    """
    for mark in _STRIPPED:
        text = text.strip(mark)
    places = _places(f" {text} ", options)
    return max(places, key=places.__getitem__) if places else _draw(list(options), question_id)


def parse_open(text: str) -> set[Value]:
    """Return candidates of an open answer: its key phrases and the numbers in them, normalised."""
    phrases = _key_phrases(text)
    numbers = [n for phrase in phrases for pattern in _NUMBERS for n in pattern.findall(phrase)]
    return {value for phrase in [*phrases, *numbers] for value in normalise(phrase)}


def open_is_correct(candidates: set[Value], references: Sequence[str]) -> bool:
    """Tell whether a number equals a reference, or a candidate's text contains one."""
    accepted = [value for reference in references for value in normalise(reference)]
    words = [value for value in accepted if isinstance(value, str)]
    return any(
        any(word in candidate for word in words)
        if isinstance(candidate, str)
        else candidate in accepted
        for candidate in candidates
    )


def normalise(text: str) -> list[Value]:
    """Return a number rounded to two decimals, or lower-case text.

    A single character comes with a space on either side, so that it only matches as a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _places(text: str, options: Mapping[str, str]) -> dict[str, int]:
    """Return {letter: its last place in `text`} by the first way of writing that finds any."""
    if found := [letter for letter in options if f"({letter})" in text]:
        return {letter: text.rfind(f"({letter})") for letter in found}
    for ending in " .":
        if found := [letter for letter in options if f"{letter}{ending}" in text]:
            # never finds "A.", so of several such options the first one wins, as published
            return {letter: text.rfind(f" {letter} ") for letter in found}
    if len(text.split()) <= 5:
        return {}
    lower = text.lower()
    names = {letter: option.lower() for letter, option in options.items()}
    return {letter: lower.rfind(name) for letter, name in names.items() if name in lower}


def _key_phrases(text: str) -> list[str]:
    """Return what follows an indicator word in each line, the shortest of each; else all of it.

    An equals sign indicates too, in the last line. (The original also means to split at ends of
    sentences, by a capital after the period, but lowers the case before: nothing is split there.)
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        indicators = [*_INDICATORS, "="] if number == len(lines) else _INDICATORS
        tails = [line.split(word)[-1].strip() for word in indicators if word in line]
        shortest = ""
        for tail in tails:  # an empty tail gives way to the next one
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _STRIPPED:
            phrases.append(shortest)
    return phrases or [text]


def _draw(letters: Sequence[str], question_id: str) -> str:
    digest = hashlib.sha256(question_id.encode()).digest()
    return letters[int.from_bytes(digest[:8], "big") % len(letters)]


@register_benchmark
class MMMU(FolderBenchmark):
    """The prompt of lmms-eval: "<image 1>" stays in the text, the images come before it.

    `mmmu/validation.jsonl` has lines {id, question, options, answer, question_type}; image n of a
    question is `mmmu/images/<id>_<n>.png`. Every question has images of its own, so standard errors
    need no clusters.
    """

    name = "mmmu"
    title = "MMMU"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "validation, the option's letter or a phrase"
    }
    image_path = "mmmu/images"
    question_path = "mmmu/validation.jsonl"
    submission_file = "mmmu_answers.json"

    def item_score(self, item: Item, answer: str) -> float:
        if options := item.data["options"]:
            choices = dict(zip(ascii_uppercase, options, strict=False))
            right = parse_choice(answer, choices, str(item.question_id)) == item.data["answers"][0]
        else:
            right = open_is_correct(parse_open(answer), item.data["answers"])
        return float(right)

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """`accuracy` over all questions, and over those of each domain under its name."""
        return {"accuracy": items} | {
            domain: [item for item in items if item.data["domain"] == domain] for domain in DOMAINS
        }

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return `{id: answer}`, which the official scripts parse and score."""
        given = zip(items, answers, strict=True)
        return dump_json({str(item.question_id): text for item, text in given})

    def sources(self) -> Sources:
        originals = "a folder mmmu/ that was prepared elsewhere"
        return self.published(900, originals, build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        rows = []
        for row in read(ROWS):
            for number in range(1, 8):
                if (image := row[f"image_{number}"]) is not None:
                    layout.image(self.image_folder() / f"{row['id']}_{number}.png", image)
            rows.append({key: row[key] for key in FIELDS})
        layout.lines(self.question_file(), rows)

    def read_items(self) -> list[Item]:
        path = self.question_file()
        rows = read_jsonl(path, self.name, fields=FIELDS)
        if not rows:
            raise TaskError(f"{path} has no questions")
        return [self._item(*pair) for pair in enumerate(index_by(rows, "id", path).values())]

    def _item(self, index: int, row: Mapping[str, Any]) -> Item:
        name, where = str(row["id"]), f"question {row['id']!r} of {self.question_file()}"
        subject = name.split("_", 1)[-1].rpartition("_")[0]
        if subject not in _DOMAIN_OF:
            raise TaskError(f"{where} must have an id like validation_Accounting_1")
        options = _as_list(row["options"], where)
        answers = _references(row["answer"], where)
        if not answers:
            raise TaskError(f"{where} has no answer")
        if row["question_type"] not in QUESTION_TYPES:
            raise TaskError(
                f"question_type of {where} is {as_json(row['question_type'])}; one of "
                f"{', '.join(QUESTION_TYPES)}"
            )
        if row["question_type"] == "multiple-choice":
            if not options or answers[0] not in list(ascii_uppercase[: len(options)]):
                raise TaskError(f"{where} needs options, and the letter of one as its answer")
            text = with_options(row["question"], options) + "\n" + OPTION_LETTER
        else:
            options, text = [], row["question"] + "\n" + SHORT_ANSWER
        numbers = sorted(set(map(int, _IMAGE.findall(text))))
        return Item(
            index,
            row["id"],
            tuple(f"{name}_{number}.png" for number in numbers),
            text,
            row["question"],
            {"options": options, "answers": answers, "domain": _DOMAIN_OF[subject]},
        )


def _references(answer: Any, where: str) -> list[str]:
    """Return every accepted answer: an open question's may be a list, as a Python literal."""
    if isinstance(answer, str) and answer.startswith("["):
        try:
            answer = ast.literal_eval(answer)
        except _NO_LITERAL:  # text that begins with a bracket: [0, 1)
            return [answer]
    return _words(answer if isinstance(answer, list) else [answer], f"the answer of {where}")


def _as_list(value: Any, where: str) -> list[str]:
    """Return a list of texts, which the published files write as Python literals; null is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except _NO_LITERAL as error:
            raise TaskError(f"{where} is damaged: {value[:60]!r} is not a list") from error
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise TaskError(f"{where} is damaged: {value!r} is not a list")
    return _words(value, f"an option of {where}")


def _words(values: Sequence[Any], what: str) -> list[str]:
    """Return texts and numbers as text.

    Raises:
        TaskError: one is anything else, called `what` in the message.
    """
    for value in values:
        if not isinstance(value, float) and not is_id(value):
            raise TaskError(f"{what} must be text or a number, not {value!r}"[:200])
    return [str(value) for value in values]
