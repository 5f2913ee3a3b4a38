"""TextVQA, val 0.5.1: 5,000 questions whose answers are written in the image.

An answer is paired with its annotation as LLaVA's evaluation does it: it carries the image's id and
the prompt; the question is recovered from the prompt, and (image id, question) finds the human
answers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.rules.vqa import textvqa_accuracy
from llava.eval.tasks.base import Item, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, Row, is_id, read_json
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, question_line
from llava.utils import UserInputError

PEOPLE = 10  # who answered each question
OCR_LINE = "Reference OCR token: "
ROWS = Dataset(
    "lmms-lab/textvqa", "image_id question_id question answers ocr_tokens image", "validation"
)

_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)

Key = tuple[Any, str]


def question_in(prompt: str) -> str:
    """Return the question that `prompt` asks, in lower case.

    Three forms exist: the question, an OCR line (before or after it) and the instruction, each on
    a line; the question and the instruction; and "OCR tokens: ... Question: ... Short answer:".

    Raises:
        UserInputError: it has another form.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := _OLD_PROMPT.search(prompt):
            return found[1].lower()
    elif OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_LINE.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserInputError(
        f"cannot find the question in the TextVQA prompt {prompt!r}; expected a line with it, "
        f"perhaps a line {OCR_LINE!r}, and a line with the instruction"
    )


def read_annotations(path: Path, task: str | None = None) -> dict[Key, list[str]]:
    """Read {(image id, lower-case question): human answers} of TextVQA's annotation file.

    Where two annotations share the key the later one counts, as in the published code.

    Raises:
        UserInputError: it has other content; the message names `path`.
    """
    content = read_json(path, task)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise TaskError(f"{path} must have a list of annotations under `data`")
    found = {}
    for number, row in enumerate(content["data"], start=1):
        what = f"{path}: TextVQA annotation {number}"
        try:
            key, answers = (row["image_id"], row["question"].lower()), row["answers"]
            if not isinstance(answers, list):
                raise TypeError("answers must be a list")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"{what} lacks image_id, question or answers") from error
        if not is_id(key[0]) or not all(isinstance(text, str) for text in answers):
            raise UserInputError(f"{what} is damaged: its image_id and answers must be text")
        if len(answers) != PEOPLE:
            raise UserInputError(
                f"{what} has {len(answers)} answers instead of {PEOPLE}; "
                "only the splits train and val come with answers"
            )
        found[key] = answers
    return found


def answers_for(known: Mapping[Key, list[str]], image_id: Any, prompt: str) -> list[str]:
    """Return the human answers to a prompt.

    Raises:
        UserInputError: no annotation asks that.
    """
    question = question_in(prompt)
    if (image_id, question) not in known:
        raise UserInputError(
            f"no TextVQA annotation of image {image_id!r} asks {question!r}; do results and "
            "annotations belong to one split?"
        )
    return known[image_id, question]


@register_benchmark
class TextVQA(PublishedQuestions):
    """VQA accuracy of EvalAI-normalised answers, the error clustered by image.

    The question id is the image's, so it occurs once for every question about the image.
    """

    name = "textvqa"
    title = "TextVQA"
    protocols: ClassVar[Mapping[str, str]] = {
        "ocr": "the prompt lists OCR tokens, as LLaVA-1.5 publishes its figures",
        "no-ocr": "the prompt is the question alone, as LLaVA-1.6 publishes its figures",
    }
    unique_ids = False
    image_path = "textvqa/train_images"
    question_path = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    annotation_paths = ("textvqa/TextVQA_0.5.1_val.json",)

    def rows(self) -> list[Row]:
        """Read the one question file of both protocols: `no-ocr` leaves out its OCR lines."""
        rows = super().rows()
        if self.protocol == "ocr":
            return rows
        return [row | {"text": self.bare(row["text"]) + SHORT_ANSWER} for row in rows]

    def bare(self, text: str) -> str:
        lines = super().bare(text).split("\n")
        return "\n".join(line for line in lines if not line.startswith(OCR_LINE.rstrip()))

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        known = read_annotations(self.annotation_files()[0], self.name)
        return ({"answers": answers_for(known, row["question_id"], row["text"])} for row in rows)

    def item_score(self, item: Item, answer: str) -> float:
        return textvqa_accuracy(answer, item.data["answers"])

    def sources(self) -> Sources:
        originals = f"{ARCHIVE}, and TextVQA's TextVQA_0.5.1_val.json and train_val_images.zip"
        return self.published(5_000, originals, build=self.build)

    def build(self, read: Read, layout: Layout) -> None:
        """Make both files; LLaVA takes the image's id for the question's."""
        annotations, prompts = [], []
        for row in read(ROWS):
            image = f"{row['image_id']}.jpg"
            layout.image(self.image_folder() / image, row["image"])
            keys = ("image_id", "question_id", "question", "answers")
            annotations.append({key: row[key] for key in keys})
            text = f"{row['question']}\n{OCR_LINE}{', '.join(row['ocr_tokens'])}{SHORT_ANSWER}"
            prompts.append(question_line(row["image_id"], image, text))
        layout.json(self.annotation_files()[0], {"data": annotations})
        layout.lines(self.question_file(), prompts)
