"""`python -m llava.eval.model_vqa_mmbench`: answers to MMBench's tables."""

from __future__ import annotations

import argparse
import base64
import binascii
import csv
import io
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from PIL import Image

from llava.eval import vqa
from llava.eval.tasks.base import Item, TaskError
from llava.images import decode_image
from llava.utils import UserInputError

OPTIONS = ("A", "B", "C", "D")
SUFFIXES = {
    "en": "\nAnswer with the option's letter from the given choices directly.",
    "cn": "\n请直接回答选项字母。",
}
# What the published reader takes for an empty cell. "None" is among them: an option that reads
# "None" does not exist for MMBench's own evaluation either.
_WORDS = """#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan
null none NONE Nan NAN"""
EMPTY = frozenset(["", "#N/A N/A", *_WORDS.split()])


class MMBench(vqa.QuestionList):
    """A TSV table of `index, [hint], question, A, B, ..., image` with base64 images.

    `all_rounds` asks every question once for each of its options, which move up by one each time.
    """

    def __init__(self, file: Path, suffix: str, all_rounds: bool) -> None:
        super().__init__(file, file.parent)
        self.suffix, self.all_rounds = suffix, all_rounds
        self._images: dict[str, str] = {}

    def items(self) -> list[Item]:
        items: list[Item] = []
        for row in self._rows():
            self._images[row["index"]] = row["image"]
            letters = list(takewhile(lambda letter, row=row: _filled(row.get(letter)), OPTIONS))
            options = [row[letter] for letter in letters]
            for turn in range(len(options) if self.all_rounds else 1):
                order = options[turn:] + options[:turn]
                chars = letters[turn:] + letters[:turn]
                items.append(self._item(len(items), row, turn, order, chars, letters))
        return items

    def load_image(self, name: str) -> Image.Image:
        """The image of row `name`. Raises UserInputError if its cell holds none."""
        what = f"of row {name} in {self.file}"
        try:
            content = base64.b64decode(self._images[name], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserInputError(f"the image {what} is no base64 text ({error})") from error
        return decode_image(content, what)

    def _item(
        self,
        place: int,
        row: dict[str, str],
        turn: int,
        options: list[str],
        chars: list[str],
        letters: list[str],
    ) -> Item:
        question = row["question"]
        if _filled(row.get("hint")):
            question = f"{row['hint']}\n{question}"
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        prompt = "\n".join([question, *lines])
        extra = {
            "before": {"round_id": turn},
            "after": {"options": options, "option_char": chars},
        }
        data = {"prompt": prompt, "extra": extra}
        number = row["index"]
        name = int(number) if number.isdecimal() else number
        return Item(place, name, (number,), prompt + self.suffix, question, data)

    def _rows(self) -> list[dict[str, str]]:
        text = vqa.read_bytes(self.file).decode("utf-8-sig")
        limit = csv.field_size_limit(len(text) + 1)  # an image is longer than csv's usual limit
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
        except csv.Error as error:
            raise TaskError(f"{self.file} is damaged or cut short ({error})") from error
        finally:
            csv.field_size_limit(limit)
        for number, row in enumerate(rows, start=1):
            what = f"row {number}"
            vqa.require(row, ("index", "question", "A", "image"), self.file, what)
            if None in row or None in row.values():
                raise TaskError(f"{what} of {self.file} is damaged or cut short; get it anew")
        names = [row["index"] for row in rows]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise TaskError(f"{self.file} holds the index {twice} twice")
        return rows


def _filled(cell: str | None) -> bool:
    return cell is not None and cell not in EMPTY


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
