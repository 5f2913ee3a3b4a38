"""MMBench in English and Chinese: options, asked once or in every rotation of them.

Which option an answer names is read without a language model as judge. MMBench's evaluation first
matches by rules and asks a GPT only about what is left. These are the rules; what they cannot read
is wrong here, so the figure is a lower bound of the server's. LLaVA is asked for a letter and gives
one, which makes the difference small.
"""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.data.layout import Dataset, Layout, Read, image_bytes
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Benchmark, Item, Metric, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import (
    OPTION_LETTER,
    OPTION_LETTER_CN,
    hash_files,
    how_to_get,
    with_options,
)
from llava.eval.tasks.tsv import Cell, Table, read_table, write_cell, write_xlsx
from llava.images import decode_base64
from llava.utils import UserInputError

LETTERS = "ABCD"
ROTATION = 10**6  # the table gives rotation r of question i the index i + r * ROTATION
COLUMNS = ("question", "hint", *LETTERS, "image")
PUBLISHED_COLUMNS = (
    "index",
    *COLUMNS[:-1],
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)
# Of the sheet to upload: columns that the server has, and the place of the column of predictions.
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PLACE = 6

_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_ARTICLE = re.compile(r"\bA(?=\s+(?!or\b|and\b)[a-z])")
_NEAR = 5  # words: a lone letter counts near the start or the end of an answer only


def match_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of `options` ({letter: option text}) that `text` names; None if unclear.

    First as a letter: the only option letter that is a word of the answer, among its first or
    last five words ("A" directly before another word is the article, not a letter). Then as text:
    the only option whose text is in the answer, if the answer is at most twice as long as all
    options together.
    """
    words = _MARKS.sub(" ", _ARTICLE.sub(" ", text)).split()
    letters = {word for word in words if word in options}
    if len(letters) > 1:
        return None
    if letters.intersection(words[:_NEAR] + words[-_NEAR:]):
        return letters.pop()
    return _match_text(text, options)


def circular(
    groups: Sequence[Hashable], right: Sequence[bool], rotations: Sequence[int]
) -> dict[Hashable, bool]:
    """Return {question: right in every rotation of its options}, of questions asked in all.

    Args:
        groups [n]: the question that each answer belongs to.
        right [n]: whether the answer is right.
        rotations [n]: in how many rotations that question is asked; a question of which some are
            missing (a limited run) has no circular score.
    """
    wanted = dict(zip(groups, rotations, strict=True))
    seen = defaultdict(list)
    for group, value in zip(groups, right, strict=True):
        seen[group].append(value)
    return {group: all(values) for group, values in seen.items() if len(values) == wanted[group]}


def _match_text(text: str, options: Mapping[str, str]) -> str | None:
    answer = text.lower()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    held = [letter for letter, option in options.items() if option.lower() in answer]
    return held[0] if len(held) == 1 else None


TableRow = Mapping[str, str | None]


def rotate(item: Item) -> Iterator[Item]:
    """Yield a question in every rotation of its options: each moves one place up a round."""
    options, answer = item.data["options"], item.data["answer"]
    count = len(options)
    letters = LETTERS[:count]
    for turn in range(count):
        moved = dict(zip(letters, letters[-turn:] + letters[:-turn], strict=True))
        letter = moved.get(answer, answer)  # None, or a letter beyond the options, stays
        turned = {"options": options[turn:] + options[:turn], "answer": letter, "rotations": count}
        name = int(item.question_id) + turn * ROTATION
        yield replace(item, question_id=name, data={**item.data, **turned})


def read_questions(path: Path, task: str | None = None, columns: Sequence[str] = ()) -> Table:
    """Read a table whose `index` names its rows.

    Raises:
        TaskError: an index is missing, or there twice.
    """
    table = read_table(path, task, ("index", *columns))
    names = Counter(row["index"] for row in table.rows)
    if None in names:
        raise TaskError(f"a row of {path} has no index")
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise TaskError(f"{path} has the index {twice[0]} twice; keep one of the rows")
    return table


def images_of(table: Table) -> dict[str, str]:
    """Return {index: base64 text}; a row may name another row, whose image it shares."""
    cells = {row["index"] or "": row["image"] or "" for row in table.rows}
    return {row: cells.get(text, text) for row, text in cells.items()}


def options_of(row: TableRow) -> list[str]:
    """Return the options of a row up to the first that is absent."""
    cells = (row.get(letter) for letter in LETTERS)
    return [option for option in takewhile(_is_given, cells) if option is not None]


def question_of(row: TableRow) -> str:
    """Return the question of a row, with its hint on a line before it."""
    hint, question = row.get("hint"), row["question"] or ""
    return f"{hint}\n{question}" if _is_given(hint) else question


def sheet(table: Table, answers: Mapping[Any, str]) -> tuple[list[str], list[list[Cell]]]:
    """Return columns and rows to upload: what the server lacks of the table, with `prediction`.

    A row without an answer keeps an empty cell.

    Raises:
        TaskError: the table has too few columns.
    """
    kept = [name for name in table.columns if name not in DROPPED]
    if len(kept) < PLACE:
        raise TaskError(
            f"the annotation table has the columns {', '.join(table.columns)}; `prediction` goes "
            f"after {PLACE} that are uploaded. Is it MMBench's TSV file?"
        )
    cells = {name: table.typed(name) for name in kept}
    cells["prediction"] = [answers.get(name) for name in table.typed("index")]
    columns = [*kept[:PLACE], "prediction", *kept[PLACE:]]
    return columns, [list(row) for row in zip(*(cells[name] for name in columns), strict=True)]


@register_benchmark
class MMBench(Benchmark):
    """Scored by rules alone (`match_option`), so without a GPT and offline.

    Standard errors are clustered: by image in `accuracy`, by question in `vanilla_accuracy`.
    """

    name = "mmbench"
    title = "MMBench"
    protocols: ClassVar[Mapping[str, str]] = {
        "single": "dev split, every question once",
        "circular": "dev split, every question in every rotation of its options",
    }
    max_new_tokens = 1024
    file: ClassVar[str] = "mmbench/mmbench_dev_20230712.tsv"
    suffix: ClassVar[str] = OPTION_LETTER
    language: ClassVar[str] = "en"

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        super().__init__(root, protocol)
        self.path = root / self.file
        if self.protocol == "circular":
            self.headline = "circular_accuracy"

    def items(self) -> list[Item]:
        return list(self._items)

    def load_image(self, name: str) -> Image.Image:
        try:
            what = f"the image of row {name} of {self.path}"
            return decode_base64(self._images[name], what, self.pixels)
        except UserInputError as error:
            raise UserInputError(f"{error}{how_to_get(self.name)}") from error

    def data_hash(self) -> str:
        return hash_files([self.path])

    def item_score(self, item: Item, answer: str) -> float | None:
        if item.data["answer"] is None:
            return None
        options = dict(zip(LETTERS, item.data["options"], strict=False))
        return float(match_option(answer, options) == item.data["answer"])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """Return `accuracy`; in rotations `circular_accuracy` (all right) and `vanilla_accuracy`.

        Nothing where the table has no answers (MMBench's test split).
        """
        found = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        scores = [score for score in found if score is not None]
        if not scores or len(scores) != len(found):
            return {}
        if self.protocol == "single":
            return {"accuracy": metric_of(scores, [item.images for item in items])}
        questions = [item.data["question"] for item in items]
        rotations = [item.data["rotations"] for item in items]
        rounds = circular(questions, [score == 1 for score in scores], rotations)
        metrics = {"vanilla_accuracy": metric_of(scores, questions)}
        if rounds:
            metrics["circular_accuracy"] = metric_of([float(value) for value in rounds.values()])
        return metrics

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """Write the server's spreadsheet, if every row of the table has been asked.

        A table with rotations in it is asked completely under `circular` only.
        """
        given = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        if not given.keys() >= set(self._table.typed("index")):
            return []
        path = folder / f"{self.name}_submission.xlsx"
        write_xlsx(path, *sheet(self._table, given))
        return [path]

    def sources(self) -> Sources:
        return Sources(
            count=None,
            files=[self.path],
            images=None,
            originals=f"MMBench's {self.path.name}",
            build=self.build,
        )

    def build(self, read: Read, layout: Layout) -> None:
        """Make the TSV file with the columns and their order as published."""
        lines = ["\t".join(PUBLISHED_COLUMNS)]
        columns = "index question hint A B C D answer image"
        for row in read(Dataset("lmms-lab/MMBench", columns, "dev", self.language)):
            image = base64.b64encode(image_bytes(row["image"], f"row {row['index']}"))
            row |= {"image": image.decode("ascii"), "l2-category": row.get("L2-category")}
            lines.append("\t".join(write_cell(row.get(key)) for key in PUBLISHED_COLUMNS))
        layout.write(self.path, "\n".join(lines) + "\n")

    @cached_property
    def _table(self) -> Table:
        table = read_questions(self.path, self.name, COLUMNS)
        names = table.typed("index")
        if not names or not all(isinstance(name, int) for name in names):
            raise TaskError(f"the column `index` of {self.path} must be whole numbers")
        return table

    @cached_property
    def _images(self) -> dict[str, str]:
        return images_of(self._table)

    @cached_property
    def _items(self) -> list[Item]:
        """Make what is asked, in the table's order."""
        rows = self._table.rows
        asked = Counter(int(row["index"] or 0) % ROTATION for row in rows)
        first = {text: row for row, text in reversed(self._images.items())}
        items = [self._item(row, asked, first) for row in rows]
        unturned = [item for item in items if int(item.question_id) < ROTATION]
        if self.protocol == "single":
            items = unturned
        elif len(unturned) == len(items):
            items = [turned for item in items for turned in rotate(item)]
        return [
            replace(
                item,
                index=index,
                text=with_options(item.question, item.data["options"]) + self.suffix,
            )
            for index, item in enumerate(items)
        ]

    def _item(self, row: TableRow, asked: Mapping[int, int], first: Mapping[str, str]) -> Item:
        """Make the item of a row, as yet without its text.

        Its answer may be beyond the options: where the right one reads "None", it cannot be given.
        """
        name = row["index"] or ""
        options = options_of(row)
        answer = row.get("answer")
        if row["question"] is None or not options:
            raise TaskError(f"row {name} of {self.path} has no question or no options")
        if answer is not None and answer not in tuple(LETTERS):
            raise TaskError(
                f"the answer {answer!r} of row {name} of {self.path} must be a letter of {LETTERS}"
            )
        question = int(name) % ROTATION
        data = {
            "question": question,
            "options": options,
            "answer": answer,
            "rotations": asked[question],
        }
        return Item(0, int(name), (first[self._images[name]],), "", question_of(row), data)


@register_benchmark
class MMBenchCN(MMBench):
    """The Chinese translation, with a Chinese suffix."""

    name = "mmbench-cn"
    title = "MMBench-CN"
    file = "mmbench_cn/mmbench_dev_cn_20231003.tsv"
    suffix = OPTION_LETTER_CN
    language = "cn"


def _is_given(cell: str | None) -> bool:
    """Return False for what LLaVA takes for an absent option or hint: empty, or any "none"."""
    return cell is not None and cell.lower() not in ("nan", "none")
