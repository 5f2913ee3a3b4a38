"""ScienceQA as LLaVA scores it: letters are read strictly; accuracy of all and of those with image.

Source: behaviour of LLaVA's `eval_science_qa`. A letter that cannot be read, a letter beyond the
choices and a missing answer all count as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.utils import UserInputError

LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Verdict:
    """One question: `letter` is what was read ("FAILED" if nothing), `choice` its index or -1."""

    letter: str
    choice: int
    correct: bool


def parse_letter(text: str, letters: Sequence[str] = LETTERS) -> str:
    """The letter that `text` gives, or "FAILED".

    It is the whole text, or stands in front of ". ", or is the only X of "The answer is X" that is
    followed by one more character. Nothing else is read: "B.", "(B)" and "b" fail.
    """
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def judge(text: str, answer: int, choices: int, letters: Sequence[str] = LETTERS) -> Verdict:
    """Hold the answer `text` to a question with `choices` choices against the right index."""
    letter = parse_letter(text, letters)
    valid = list(letters[:choices])
    choice = valid.index(letter) if letter in valid else -1
    return Verdict(letter, choice, choice == answer)


def evaluate(
    problems: Mapping[str, Mapping[str, Any]],
    split: Sequence[str],
    answers: Mapping[str, Mapping[str, Any]],
    letters: Sequence[str] = LETTERS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """LLaVA's two result files: `{"correct": [...], "incorrect": [...]}` and the summary.

    Args:
        problems: `problems.json`: {id: {"answer": index, "choices": [...]}}.
        split: ids that count; an id without an answer counts as wrong and as text only.
        answers: {id: answer line}, with `text` and the `prompt` that was asked.

    Raises:
        UserInputError: fewer letters than a right choice needs.
    """
    analysis: dict[str, Any] = {"correct": [], "incorrect": []}
    results: dict[str, int] = {}
    outputs: dict[str, str] = {}
    for name in dict.fromkeys(split):
        line = answers.get(name, {"text": FAILED, "prompt": "Unknown"})
        problem = problems[name]
        if problem["answer"] >= len(letters):
            raise UserInputError(
                f"the right choice of problem {name} is number {problem['answer'] + 1}, and there "
                f"are only {len(letters)} letters; give more in --options"
            )
        verdict = judge(line["text"], problem["answer"], len(problem["choices"]), letters)
        results[name], outputs[name] = verdict.choice, line["text"]
        analysis["correct" if verdict.correct else "incorrect"].append(
            {
                "question_id": name,
                "parsed_ans": verdict.letter,
                "ground_truth": letters[problem["answer"]],
                "question": line["prompt"],
                "pred": line["text"],
                "is_multimodal": "<image>" in line["prompt"],
            }
        )
    correct = len(analysis["correct"])
    summary = {
        "acc": correct / len(results) * 100,
        "correct": correct,
        "count": len(results),
        "results": results,
        "outputs": outputs,
    }
    return analysis, summary


def image_accuracy(analysis: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """Accuracy in percent over the answers whose prompt held an image; None without any."""
    right = sum(row["is_multimodal"] for row in analysis["correct"])
    total = right + sum(row["is_multimodal"] for row in analysis["incorrect"])
    return right / total * 100 if total else None
