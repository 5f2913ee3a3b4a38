"""Scoring of short answers that VQAv2, TextVQA and VizWiz share: normalisation and VQA accuracy.

VQA accuracy is how well an answer agrees with ten people's. An answer that n of the other nine
people gave is right to min(1, n / 3), averaged over leaving out each of the ten in turn. TextVQA
and VQAv2 apply it to differently normalised texts.

EvalAI's normalisation brings predictions and human answers to one spelling before they are
compared: lower case, no articles, digits for number words, little punctuation. The published code
has two accidents that every published figure contains, so they are kept here:

* Its rule for periods looks for "<=" and a digit where a look-behind was meant, and so never
  applies: a period goes unless a digit follows it, whatever is in front.
* It hands a flag to `re.sub` where the number of replacements belongs: no more than the first 32
  such periods of a text go.

Source: the evaluation code of VQA (Antol et al., 2015), in the form that EvalAI and LLaVA use.
"""

import math
import re
from collections.abc import Sequence

PERIODS_REMOVED = 32  # the value of re.UNICODE, see above

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
# The contractions of the published table. Its entries in upper case are left out: every word is in
# lower case when it is looked up.
_CORRECT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# {spelling: correct form}: one apostrophe is missing; "somebodyd" is the published table's.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CORRECT.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy in [0, 1] of `prediction`; it and all `answers` are normalised first."""
    return agreement(normalise(prediction), [normalise(answer) for answer in answers])


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy in [0, 1] of `prediction` in VQA's own evaluation.

    Nothing is normalised where all people agree to the letter, and possessives stay as they are:
    unlike for TextVQA. LLaVA hands in EvalAI-normalised predictions.
    """
    prediction = _one_line(prediction)
    answers = [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalise_words(strip_punctuation(prediction))
        answers = [normalise_words(strip_punctuation(answer)) for answer in answers]
    return agreement(prediction, answers)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over the answers of min(1, n / 3), n of the others equal to `prediction`."""
    matches = answers.count(prediction)
    shares = [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]
    return math.fsum(shares) / len(shares)


def normalise(answer: str) -> str:
    """Return `answer` as EvalAI compares it; empty where nothing of it counts."""
    return normalise_words(strip_punctuation(_one_line(_separate_possessives(answer))))


def strip_punctuation(text: str) -> str:
    """Drop each mark of punctuation, or replace it by a space where it joins words.

    A mark goes without trace if it touches a space anywhere in `text`, and so do all marks of a
    text that has a number with a comma in it. Apostrophes, colons, & and % stay.
    """
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", stripped, count=PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Return lower-case `text` without articles, with digits and contractions spelt right."""
    numbers = (_DIGITS.get(word, word) for word in text.lower().split())
    words = (word for word in numbers if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def _separate_possessives(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
