"""`python -m llava.eval.model_vqa_mmbench`: answers to MMBench's tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image

from llava.eval import vqa
from llava.eval.tasks.base import Item, TaskError
from llava.eval.tasks.files import OPTION_LETTER, OPTION_LETTER_CN
from llava.eval.tasks.mmbench import (
    LETTERS,
    Row,
    images_of,
    options_of,
    question_of,
    read_questions,
)
from llava.eval.tasks.tsv import Cell, Table
from llava.images import decode_base64

SUFFIXES = {"en": OPTION_LETTER, "cn": OPTION_LETTER_CN}


class MMBench(vqa.QuestionList):
    """A TSV table of `index, [hint], question, A, B, ..., image` with base64 images.

    `all_rounds` asks every question once for each of its options, which move up by one each time.
    """

    def __init__(self, file: Path, suffix: str, all_rounds: bool) -> None:
        super().__init__(file, file.parent)
        self.suffix, self.all_rounds = suffix, all_rounds

    def items(self) -> list[Item]:
        items: list[Item] = []
        for name, row in zip(self._table.typed("index"), self._table.rows, strict=True):
            options = options_of(row)
            for turn in range(len(options) if self.all_rounds else 1):
                items.append(self._item(len(items), name, row, turn))
        return items

    def load_image(self, name: str) -> Image.Image:
        """The image of row `name`. Raises UserInputError if its cell holds none."""
        what = f"the image of row {name} in {self.file}"
        return decode_base64(self._images[name], what, self.pixels)

    def _item(self, place: int, name: Cell, row: Row, turn: int) -> Item:
        """A row with its options moved up by `turn`."""
        if row["question"] is None:
            raise TaskError(f"row {row['index']} of {self.file} has no question")
        options = options_of(row)
        letters = LETTERS[: len(options)]
        options = options[turn:] + options[:turn]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        question = question_of(row)
        prompt = "\n".join([question, *lines])
        extra = {
            "before": {"round_id": turn},
            "after": {"options": options, "option_char": [*letters[turn:], *letters[:turn]]},
        }
        data = {"prompt": prompt, "extra": extra}
        key = name if isinstance(name, int) else str(row["index"])
        images = (str(row["index"]),)
        return Item(place, key, images, prompt + self.suffix, question, data)

    @cached_property
    def _table(self) -> Table:
        return read_questions(self.file, columns=("question", "A", "image"))

    @cached_property
    def _images(self) -> dict[str, str]:
        return images_of(self._table)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--all-rounds", action="store_true", help="ask with the options in every rotation")
    add("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    add("--lang", choices=tuple(SUFFIXES), default="en", help="of that request")


PROGRAM = vqa.Program(
    "model_vqa_mmbench",
    "Answer one of MMBench's tables.",
    lambda args: MMBench(
        args.question_file,
        SUFFIXES[args.lang] if args.single_pred_prompt else "",
        args.all_rounds,
    ),
    _add_flags,
)


def main(argv: Sequence[str] | None = None) -> int:
    """See `llava.eval.vqa.main`."""
    return vqa.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
