"""VQA accuracy: how well an answer agrees with ten people's.

An answer that n of the other nine people gave is right to min(1, n / 3), averaged over leaving out
each of the ten in turn. TextVQA and VQAv2 apply it to differently normalised texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llava.eval.rules.vqa import normalise, normalise_words, strip_punctuation


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of `prediction`; it and all `answers` are EvalAI-normalised."""
    return agreement(normalise(prediction), [normalise(answer) for answer in answers])


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of `prediction` in VQA's own evaluation.

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
    """Mean over the answers of min(1, n / 3), n of the others being equal to `prediction`."""
    matches = answers.count(prediction)
    shares = [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]
    return math.fsum(shares) / len(shares)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
