"""ScienceQA: school questions with options; about half of them show an image.

Letters are read strictly, as LLaVA's `eval_science_qa` does. A letter that cannot be read, a letter
beyond the choices and a missing answer all count as wrong.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    Kind,
    check_fields,
    check_ids,
    check_listed,
    image_names,
    index_by,
    read_json,
)
from llava.eval.tasks.published import ARCHIVE, FolderBenchmark, answer_lines
from llava.storage import dump_lines
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
    """Return the letter that `text` gives, or "FAILED".

    It is the whole text, or comes before ". ", or is the only X of "The answer is X" that is
    followed by one more character. Nothing else is read: "B.", "(B)" and "b" fail.
    """
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def judge(text: str, answer: int, choices: int, letters: Sequence[str] = LETTERS) -> Verdict:
    """Compare the answer `text` to a question of `choices` choices with the right index."""
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
    """Return LLaVA's two result files: `{"correct": [...], "incorrect": [...]}` and the summary.

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
    """Return the accuracy in percent over answers whose prompt had an image; None without any."""
    right = sum(row["is_multimodal"] for row in analysis["correct"])
    total = right + sum(row["is_multimodal"] for row in analysis["incorrect"])
    return right / total * 100 if total else None


@register_benchmark
class ScienceQA(FolderBenchmark):
    """Every image belongs to one question, so standard errors need no clusters."""

    name = "scienceqa"
    title = "SQA-IMG"
    protocols: ClassVar[Mapping[str, str]] = {"llava": "test split, the option's letter"}
    max_new_tokens = 1024
    headline = "image_accuracy"
    image_path = "scienceqa/images/test"
    question_path = "scienceqa/llava_test_CQM-A.json"
    annotation_paths = ("scienceqa/problems.json", "scienceqa/pid_splits.json")
    submission_file = "scienceqa_answers.jsonl"

    def item_score(self, item: Item, answer: str) -> float:
        return float(judge(answer, item.data["answer"], item.data["choices"]).correct)

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """`image_accuracy` over questions with an image (if any), `accuracy` over all."""
        return {"image_accuracy": [item for item in items if item.images], "accuracy": items}

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the answer file that `llava.eval.eval_science_qa` reads."""
        rows = answer_lines(items, answers)
        for item, row in zip(items, rows, strict=True):
            row["prompt"] = "<image>\n" * bool(item.images) + item.text
        return dump_lines(rows)

    def sources(self) -> Sources:
        originals = (
            f"{ARCHIVE}, and ScienceQA's problems.json, pid_splits.json and test.zip "
            "(public datasets leave out the ids of the problems)"
        )
        return self.published(4_241, originals, with_image=2_017)

    def read_items(self) -> list[Item]:
        path, problem_file, _ = self.files()
        problems, _ = read_split(path.parent, "test", self.name)
        rows = read_json(path, self.name)
        if not check_listed(rows, "question", path, {"id": Kind.ID, "conversations": Kind.ANY}):
            raise TaskError(f"{path} has no questions")
        check_ids(index_by(rows, "id", path), problems, path, problem_file)
        return [self._item(*pair, problems) for pair in enumerate(rows)]

    def _item(self, index: int, row: dict[str, Any], problems: Mapping[str, Any]) -> Item:
        question, images = first_turn(row, f"question {row['id']!r} of {self.question_file()}")
        problem = problems[row["id"]]
        return Item(
            index,
            row["id"],
            images,
            question + OPTION_LETTER,
            question,
            {"answer": problem["answer"], "choices": len(problem["choices"])},
        )


def first_turn(row: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Read the question of a row, without image marks, and the names of its images (one or none).

    Raises:
        TaskError: the row cannot be asked; the message names `where`.
    """
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise TaskError(f"{where} has no first turn; write it into `conversations`")
    check_fields(turns[0], f"the first turn of {where}", {"value": Kind.TEXT})
    images = image_names(row.get("image"), where)
    if len(images) > 1:
        raise TaskError(f"image in {where} is a list; ScienceQA asks about one picture")
    return turns[0]["value"].replace("<image>", "").strip(), images


def read_split(
    folder: Path, split: str, task: str | None = None
) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """Read all problems and the ids of one split.

    Raises:
        TaskError: the files cannot be used.
    """
    problems = read_json(folder / "problems.json", task)
    splits = read_json(folder / "pid_splits.json", task)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise TaskError(f"problems.json and pid_splits.json in {folder} must be JSON objects")
    if not splits.get(split):
        known = ", ".join(name for name in splits if splits[name])
        raise TaskError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {known}")
    names = splits[split]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskError(f"{folder / 'pid_splits.json'} must list the ids of {split!r} as texts")
    check_ids(names, problems, folder / "pid_splits.json", folder / "problems.json")
    for name in names:
        problem = problems[name] if isinstance(problems[name], dict) else {}
        answer, choices = problem.get("answer"), problem.get("choices")
        whole = isinstance(answer, int) and not isinstance(answer, bool)
        if not isinstance(choices, list) or not whole or answer not in range(len(choices)):
            raise TaskError(
                f"problem {name} in {folder / 'problems.json'} is damaged: `answer` must be the "
                "index of one of its `choices`"
            )
    return problems, names
