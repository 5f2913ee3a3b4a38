"""MMBench in English and Chinese: options, asked once or in every rotation of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

from PIL import Image

from llava.eval.converters.mmbench import sheet, write_xlsx
from llava.eval.scorers.mmbench import circular, match_option
from llava.eval.stats import metric_of
from llava.eval.tasks.base import Benchmark, Item, Metric, TaskError, register_benchmark
from llava.eval.tasks.files import OPTION_LETTER, OPTION_LETTER_CN, hash_files
from llava.eval.tasks.tsv import Table, read_table
from llava.images import decode_base64
from llava.utils import UserInputError

LETTERS = "ABCD"
ROTATION = 10**6  # the table gives rotation r of question i the index i + r * ROTATION
COLUMNS = ("question", "hint", *LETTERS, "image")

Row = Mapping[str, str | None]


@dataclass(frozen=True)
class Prompt:
    """A question in one rotation: `options` in the order shown, `answer` the letter shown.

    The letter may be beyond the options: where the right one reads "None", nobody can give it.
    """

    index: int
    question: str
    options: tuple[str, ...]
    answer: str | None
    image: str
    rotations: int

    @property
    def text(self) -> str:
        lines = [
            f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)
        ]
        return "\n".join([self.question, *lines])


def rotate(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt in every rotation of its options: each moves one place up a round."""
    count = len(prompt.options)
    for turn in range(count):
        answer = prompt.answer
        if answer is not None and LETTERS.index(answer) < count:
            answer = LETTERS[(LETTERS.index(answer) - turn) % count]
        options = prompt.options[turn:] + prompt.options[:turn]
        index = prompt.index + turn * ROTATION
        yield Prompt(index, prompt.question, options, answer, prompt.image, count)


def read_questions(path: Path, task: str | None = None, columns: Sequence[str] = ()) -> Table:
    """`read_table` of a table whose `index` names its rows. Raises TaskError where it does not."""
    table = read_table(path, task, ("index", *columns))
    names = Counter(row["index"] for row in table.rows)
    if None in names:
        raise TaskError(f"a row of {path} has no index")
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise TaskError(f"{path} holds the index {twice[0]} twice; keep one of the rows")
    return table


def images_of(table: Table) -> dict[str, str]:
    """{index: base64 text}; a row may name another row instead, whose image it shares."""
    cells = {row["index"] or "": row["image"] or "" for row in table.rows}
    return {row: cells.get(text, text) for row, text in cells.items()}


def options_of(row: Row) -> list[str]:
    """The options of a row up to the first that is absent."""
    cells = (row.get(letter) for letter in LETTERS)
    return [option for option in takewhile(_is_given, cells) if option is not None]


def question_of(row: Row) -> str:
    """The question of a row, with its hint on a line before it."""
    hint, question = row.get("hint"), row["question"] or ""
    return f"{hint}\n{question}" if _is_given(hint) else question


@register_benchmark
class MMBench(Benchmark):
    """Scored by rules alone (`llava.eval.scorers.mmbench`), so without a GPT and offline.

    Standard errors are clustered: by image in `accuracy`, by question in `vanilla_accuracy`.
    """

    name = "mmbench"
    title = "MMBench"
    protocols: ClassVar[Mapping[str, str]] = {
        "single": "dev split, every question once",
        "circular": "dev split, every question in every rotation of its options",
    }
    max_new_tokens = 1024
    headline = "accuracy"
    file: ClassVar[str] = "mmbench/mmbench_dev_20230712.tsv"
    suffix: ClassVar[str] = OPTION_LETTER

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        super().__init__(root, protocol)
        self.path = root / self.file
        if self.protocol == "circular":
            self.headline = "circular_accuracy"

    def items(self) -> list[Item]:
        return [self._item(index, prompt) for index, prompt in enumerate(self._prompts)]

    def load_image(self, name: str) -> Image.Image:
        try:
            what = f"the image of row {name} of {self.path}"
            return decode_base64(self._images[name], what, self.pixels)
        except UserInputError as error:
            mend = f"; `python -m llava.eval prepare {self.name}` gets the file again"
            raise UserInputError(f"{error}{mend}") from error

    def data_hash(self) -> str:
        return hash_files([self.path])

    def item_score(self, item: Item, answer: str) -> float | None:
        if item.data["answer"] is None:
            return None
        options = dict(zip(LETTERS, item.data["options"], strict=False))
        return float(match_option(answer, options) == item.data["answer"])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """`accuracy`; in rotations `circular_accuracy` (all of them right) and `vanilla_accuracy`.

        Nothing where the table holds no answers (MMBench's test split).
        """
        found = [self.item_score(*pair) for pair in zip(items, answers, strict=True)]
        scores = [score for score in found if score is not None]
        if not scores or len(scores) != len(found):
            return {}
        if self.protocol == "single":
            return {"accuracy": metric_of(scores, [item.images for item in items])}
        questions = [item.data["question"] for item in items]
        rounds = circular(questions, [score == 1 for score in scores], [*map(_rotations, items)])
        metrics = {"vanilla_accuracy": metric_of(scores, questions)}
        if rounds:
            metrics["circular_accuracy"] = metric_of([float(value) for value in rounds.values()])
        return metrics

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """The server's spreadsheet, if every row of the table has been asked.

        A table with rotations in it is asked completely under `circular` only.
        """
        given = {item.question_id: answer for item, answer in zip(items, answers, strict=True)}
        if not given.keys() >= set(self._table.typed("index")):
            return []
        path = folder / f"{self.name}_submission.xlsx"
        write_xlsx(path, *sheet(self._table, given))
        return [path]

    def _item(self, index: int, prompt: Prompt) -> Item:
        question = prompt.index % ROTATION
        data = {
            "question": question,
            "options": list(prompt.options),
            "answer": prompt.answer,
            "rotations": prompt.rotations,
        }
        text = prompt.text + self.suffix
        return Item(index, prompt.index, (prompt.image,), text, prompt.question, data)

    @cached_property
    def _table(self) -> Table:
        table = read_questions(self.path, self.name, COLUMNS)
        names = table.typed("index")
        if not names or not all(isinstance(name, int) for name in names):
            raise TaskError(f"the column `index` of {self.path} must hold a whole number a row")
        return table

    @cached_property
    def _images(self) -> dict[str, str]:
        return images_of(self._table)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        """What is asked, in the table's order."""
        rows = self._table.rows
        asked = Counter(int(row["index"] or 0) % ROTATION for row in rows)
        first = {text: row for row, text in reversed(self._images.items())}
        prompts = [self._prompt(row, asked, first) for row in rows]
        if self.protocol == "single":
            return [prompt for prompt in prompts if prompt.index < ROTATION]
        if any(prompt.index >= ROTATION for prompt in prompts):
            return prompts
        return [turned for prompt in prompts for turned in rotate(prompt)]

    def _prompt(self, row: Row, asked: Mapping[int, int], first: Mapping[str, str]) -> Prompt:
        name = row["index"] or ""
        options = options_of(row)
        answer = row.get("answer")
        if row["question"] is None or not options:
            raise TaskError(f"row {name} of {self.path} has no question or no options")
        if answer is not None and answer not in tuple(LETTERS):
            raise TaskError(f"the answer {answer!r} of row {name} of {self.path} is no letter")
        return Prompt(
            index=int(name),
            question=question_of(row),
            options=tuple(options),
            answer=answer,
            image=first[self._images[name]],
            rotations=asked[int(name) % ROTATION],
        )


@register_benchmark
class MMBenchCN(MMBench):
    """The Chinese translation, with a Chinese suffix."""

    name = "mmbench-cn"
    title = "MMBench-CN"
    file = "mmbench_cn/mmbench_dev_cn_20231003.tsv"
    suffix = OPTION_LETTER_CN


def _is_given(cell: str | None) -> bool:
    """False for what LLaVA takes for an absent option or hint: empty, or "none" in any case."""
    return cell is not None and cell.lower() not in ("nan", "none")


def _rotations(item: Item) -> int:
    return item.data["rotations"]
