"""`python -m llava.eval.model_vqa_science`: answers to LLaVA's ScienceQA file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval import vqa
from llava.eval.prompts import bare_question
from llava.eval.tasks.base import Item, TaskError
from llava.eval.tasks.files import OPTION_LETTER, check_fields, check_listed, image_names, read_json


class ScienceQA(vqa.QuestionList):
    """A JSON array of `id, [image], conversations`; the first turn is the question.

    With an image, the prompt that answer lines repeat begins with its mark: the scorer tells
    questions about images by it.
    """

    def __init__(self, file: Path, image_folder: Path, suffix: str) -> None:
        super().__init__(file, image_folder)
        self.suffix = suffix

    def items(self) -> list[Item]:
        rows = check_listed(
            read_json(self.file), "question", self.file, keys=("conversations",), ids=("id",)
        )
        items = []
        for index, row in enumerate(rows):
            where = f"question {index + 1} of {self.file}"
            turns = row["conversations"]
            if not isinstance(turns, list) or not turns:
                raise TaskError(f"{where} has no first turn; write it into `conversations`")
            check_fields(turns[0], f"the first turn of {where}", texts=("value",))
            question = bare_question(turns[0]["value"]).strip()
            images = image_names(row.get("image"), where)
            if len(images) > 1:
                raise TaskError(f"image in {where} is a list; ScienceQA asks about one picture")
            text = question + self.suffix
            prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if images else text
            data = {"prompt": prompt, "extra": {}}
            items.append(Item(index, row["id"], images, text, question, data))
        return items


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the option's letter alone"
    )


PROGRAM = vqa.Program(
    "model_vqa_science",
    "Answer LLaVA's ScienceQA file.",
    lambda args: ScienceQA(
        args.question_file, args.image_folder, OPTION_LETTER if args.single_pred_prompt else ""
    ),
    _add_flags,
)


def main(argv: Sequence[str] | None = None) -> int:
    """See `llava.eval.vqa.main`."""
    return vqa.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
