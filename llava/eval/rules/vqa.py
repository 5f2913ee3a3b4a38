"""EvalAI's normalisation of short answers, the common ground of VQAv2, TextVQA and VizWiz.

Predictions and human answers are brought to one spelling before they are compared: lower case, no
articles, digits for number words, little punctuation. The published code has two accidents that
every published figure contains, so they are kept here:

* Its rule for periods looks for "<=" and a digit where a look-behind was meant, and so never holds
  back: a period goes unless a digit follows it, whatever is in front.
* It hands a flag to `re.sub` where the number of replacements belongs: no more than the first 32
  such periods of a text go.

Source: the evaluation code of VQA (Antol et al., 2015), in the form that EvalAI and LLaVA use.
"""

from __future__ import annotations

import re

PERIODS_REMOVED = 32  # the value of re.UNICODE, see above

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# Correct forms, each with the spellings that stand for it ("somebodyd" is the published table's).
# Its entries in upper case are left out: every word is in lower case when it is looked up.
_APOSTROPHES = {
    "ain't": "aint",
    "aren't": "arent",
    "can't": "cant",
    "could've": "couldve",
    "couldn't": "couldnt",
    "couldn't've": "couldn'tve couldnt've",
    "didn't": "didnt",
    "doesn't": "doesnt",
    "don't": "dont",
    "hadn't": "hadnt",
    "hadn't've": "hadnt've hadn'tve",
    "hasn't": "hasnt",
    "haven't": "havent",
    "he'd": "hed",
    "he'd've": "hed've he'dve",
    "he's": "hes",
    "how'd": "howd",
    "how'll": "howll",
    "how's": "hows",
    "isn't": "isnt",
    "it'd": "itd",
    "it'd've": "itd've it'dve",
    "it'll": "itll",
    "ma'am": "maam",
    "mightn't": "mightnt",
    "mightn't've": "mightnt've mightn'tve",
    "might've": "mightve",
    "mustn't": "mustnt",
    "must've": "mustve",
    "needn't": "neednt",
    "not've": "notve",
    "o'clock": "oclock",
    "oughtn't": "oughtnt",
    "'ow's'at": "ow's'at 'ows'at 'ow'sat",
    "shan't": "shant",
    "she'd've": "shed've she'dve",
    "should've": "shouldve",
    "shouldn't": "shouldnt",
    "shouldn't've": "shouldnt've shouldn'tve",
    "somebodyd": "somebody'd",
    "somebody'd've": "somebodyd've somebody'dve",
    "somebody'll": "somebodyll",
    "somebody's": "somebodys",
    "someone'd": "someoned",
    "someone'd've": "someoned've someone'dve",
    "someone'll": "someonell",
    "someone's": "someones",
    "something'd": "somethingd",
    "something'd've": "somethingd've something'dve",
    "something'll": "somethingll",
    "that's": "thats",
    "there'd": "thered",
    "there'd've": "thered've there'dve",
    "there're": "therere",
    "there's": "theres",
    "they'd": "theyd",
    "they'd've": "theyd've they'dve",
    "they'll": "theyll",
    "they're": "theyre",
    "they've": "theyve",
    "'twas": "twas",
    "wasn't": "wasnt",
    "we'd've": "wed've we'dve",
    "we've": "weve",
    "weren't": "werent",
    "what'll": "whatll",
    "what're": "whatre",
    "what's": "whats",
    "what've": "whatve",
    "when's": "whens",
    "where'd": "whered",
    "where's": "wheres",
    "where've": "whereve",
    "who'd": "whod",
    "who'd've": "whod've who'dve",
    "who'll": "wholl",
    "who's": "whos",
    "who've": "whove",
    "why'll": "whyll",
    "why're": "whyre",
    "why's": "whys",
    "won't": "wont",
    "would've": "wouldve",
    "wouldn't": "wouldnt",
    "wouldn't've": "wouldnt've wouldn'tve",
    "y'all": "yall",
    "y'all'll": "yall'll y'allll",
    "y'all'd've": "yall'd've y'alld've y'all'dve",
    "you'd": "youd",
    "you'd've": "youd've you'dve",
    "you'll": "youll",
    "you're": "youre",
    "you've": "youve",
}
_CONTRACTIONS = {
    spelling: correct for correct, found in _APOSTROPHES.items() for spelling in found.split()
}


def normalise(answer: str) -> str:
    """`answer` as it is compared; empty where nothing of it counts."""
    return normalise_words(strip_punctuation(_one_line(_separate_possessives(answer))))


def strip_punctuation(text: str) -> str:
    """`text` with each mark of punctuation dropped, or replaced by a space where it joins words.

    A mark goes without trace if it touches a space anywhere in `text`, and so do all marks of a
    text that holds a number with a comma in it. Apostrophes, colons, & and % stay.
    """
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", stripped, count=PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Lower-case `text` without articles, number words as digits, contractions spelt right."""
    numbers = (_DIGITS.get(word, word) for word in text.lower().split())
    words = (word for word in numbers if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def _separate_possessives(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
