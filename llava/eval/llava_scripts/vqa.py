"""LLaVA's `model_vqa*`: answer a question file, over the same loop as every other run.

The four programs differ in the question file they read. An interrupted command continues where it
stopped when it is given again: what was answered is next to the answers file, in a hidden folder,
under a key of every setting, so that answers never mix.
"""

import hashlib
import sys
from abc import abstractmethod
from argparse import Namespace
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from llava.command_line import positive
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.commands.run import add_answering_flags
from llava.eval.engine.processes import processes
from llava.eval.engine.request import Arm, RunRequest, arm_of, saved_pruning
from llava.eval.engine.run import Answered, answer
from llava.eval.engine.schema import Record
from llava.eval.llava_scripts import flag, path_flag, program
from llava.eval.prompts import bare_question, has_inner_marks
from llava.eval.tasks.base import Benchmark, Item, TaskError
from llava.eval.tasks.files import (
    OPTION_LETTER,
    OPTION_LETTER_CN,
    Kind,
    check_listed,
    image_names,
    is_file,
    numbered_jsonl,
    read_bytes,
    read_json,
    with_options,
)
from llava.eval.tasks.mmbench import LETTERS, images_of, options_of, question_of, read_questions
from llava.eval.tasks.scienceqa import first_turn
from llava.eval.tasks.tsv import Table
from llava.families.spec import ModelSpec
from llava.images import decode_base64, open_image
from llava.mm_utils import get_model_name_from_path
from llava.pixels import VIEWER
from llava.pruning.flags import pruning_from
from llava.sampling import Sampling
from llava.storage import dump_lines, write_atomically
from llava.utils import UserInputError

SUFFIXES = {"en": OPTION_LETTER, "cn": OPTION_LETTER_CN}


class QuestionList(Benchmark):
    """Ask the questions of one file. Subclasses read it; LLaVA's own scripts score the answers.

    Args:
        file: the question file.
        image_folder: where images are found by name.
    """

    name = "question-file"
    title = "question file"
    protocols = {"llava": "as the file words it"}  # noqa: RUF012
    max_new_tokens = 1024
    headline = ""
    pixels = VIEWER

    def __init__(self, file: Path, image_folder: Path) -> None:
        super().__init__(file.parent)
        self.file, self.image_folder = file, image_folder

    @abstractmethod
    def items(self) -> list[Item]:
        """Read the questions.

        Answer lines repeat `data["prompt"]`; what is in `data["extra"]` goes into them as it is.
        """

    def load_image(self, name: str) -> Image.Image:
        return open_image(self.image_folder / name, self.pixels)

    def data_hash(self) -> str:
        """Hash the question file, and its images by name and size; SHA-256 (hex)."""
        digest = hashlib.sha256(read_bytes(self.file))
        for name in sorted({name for item in self.items() for name in item.images}):
            path = self.image_folder / name
            digest.update(f"{name} {path.stat().st_size if is_file(path) else -1}\n".encode())
        return digest.hexdigest()


class JsonLines(QuestionList):
    """Read LLaVA's usual question file: `question_id, image, text` a line.

    A question without an image is text alone. `image` may also be a list: several pictures, each
    marked in the text with `<image>`; without any mark they come before the text.
    """

    def items(self) -> list[Item]:
        items: list[Item] = []
        for where, row in numbered_jsonl(
            self.file, fields={"question_id": Kind.ID, "text": Kind.TEXT}
        ):
            images, text = image_names(row.get("image"), where), row["text"]
            marks = text.count(DEFAULT_IMAGE_TOKEN)
            if marks not in (0, len(images)):
                raise TaskError(
                    f"text in {where} marks {marks} images, and `image` names {len(images)}; mark "
                    f"each image once with {DEFAULT_IMAGE_TOKEN}, or none"
                )
            words = bare_question(text)
            if not has_inner_marks(text, len(images)):
                text = words
            data = {"prompt": text, "extra": {}}
            question = words.partition("\n")[0]
            items.append(Item(len(items), row["question_id"], images, text, question, data))
        return items


class ScienceQAFile(QuestionList):
    """Read a JSON array of `id, [image], conversations`; the first turn is the question.

    With an image, the prompt that answer lines repeat begins with `<image>`: the scorer tells
    questions about images by it.
    """

    def __init__(self, file: Path, image_folder: Path, suffix: str) -> None:
        super().__init__(file, image_folder)
        self.suffix = suffix

    def items(self) -> list[Item]:
        fields = {"id": Kind.ID, "conversations": Kind.ANY}
        rows = check_listed(read_json(self.file), "question", self.file, fields)
        items = []
        for index, row in enumerate(rows):
            question, images = first_turn(row, f"question {index + 1} of {self.file}")
            text = question + self.suffix
            prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if images else text
            data = {"prompt": prompt, "extra": {}}
            items.append(Item(index, row["id"], images, text, question, data))
        return items


class MMBenchTable(QuestionList):
    """Read a TSV table of `index, [hint], question, A, B, ..., image` with base64 images.

    `all_rounds` asks every question once for each of its options, which move up by one each time.
    """

    def __init__(self, file: Path, suffix: str, all_rounds: bool) -> None:
        super().__init__(file, file.parent)
        self.suffix, self.all_rounds = suffix, all_rounds

    def items(self) -> list[Item]:
        items: list[Item] = []
        for name, row in zip(self._table.typed("index"), self._table.rows, strict=True):
            index = str(row["index"])
            if row["question"] is None:
                raise TaskError(f"row {index} of {self.file} has no question")
            key = name if isinstance(name, int) else index
            question, options = question_of(row), options_of(row)
            letters = LETTERS[: len(options)]
            for turn in range(len(options) if self.all_rounds else 1):
                turned = options[turn:] + options[:turn]
                prompt = with_options(question, turned)
                after = {"options": turned, "option_char": [*letters[turn:], *letters[:turn]]}
                extra = {"before": {"round_id": turn}, "after": after}
                data = {"prompt": prompt, "extra": extra}
                text = prompt + self.suffix
                items.append(Item(len(items), key, (index,), text, question, data))
        return items

    def load_image(self, name: str) -> Image.Image:
        """Decode the image of row `name`.

        Raises:
            UserInputError: its cell is not an image.
        """
        what = f"the image of row {name} in {self.file}"
        return decode_base64(self._images[name], what, self.pixels)

    @cached_property
    def _table(self) -> Table:
        return read_questions(self.file, columns=("question", "A", "image"))

    @cached_property
    def _images(self) -> dict[str, str]:
        return images_of(self._table)


def answer_file(benchmark: QuestionList, args: Namespace) -> int:
    """Answer the questions of a chunk of the file and write LLaVA's answer lines, in its order.

    An image that cannot be read gives an empty `text` and the reason in `metadata`.

    Returns:
        The exit code: 1 if some images could not be read.
    """
    model = ModelSpec.from_flags(args).located()
    benchmark.pixels = args.pixels or benchmark.pixels
    length = getattr(args, "max_new_tokens", benchmark.max_new_tokens)
    request = RunRequest(
        benchmark=benchmark,
        model=model,
        arms=(asked_arm(args, model.path),),
        sampling=Sampling(args.temperature, args.top_p, args.num_beams, length),
        output=args.answers_file.with_name(f".{args.answers_file.name}.run"),
        batch_size=args.batch_size,
        num_chunks=args.num_chunks,
        chunk_idx=args.chunk_idx,
        seed=args.seed,
        workers=args.workers,
        command=args.command_line,
    )
    items = request.items()
    name = get_model_name_from_path(model.path)

    def finish(done: Answered) -> None:
        said = {line["index"]: line for line in done.answers}
        lines = [answer_line(item, said[item.index], name) for item in items]
        write_atomically(args.answers_file, dump_lines(lines))
        print(f"written: {args.answers_file}")

    with processes() as group:
        if not items:
            group.agree(lambda: write_atomically(args.answers_file, ""))
            return 0
        return answer(request, group, finish)


def answer_line(item: Item, record: Record, model: str) -> Record:
    """Make a line of LLaVA's answers files."""
    return {
        "question_id": item.question_id,
        **item.data["extra"].get("before", {}),
        "prompt": item.data["prompt"],
        "text": record["answer"],
        **item.data["extra"].get("after", {}),
        "answer_id": record["answer_id"],
        "model_id": model,
        "metadata": {"error": record["error"]} if "error" in record else {},
    }


def asked_arm(args: Namespace, path: str) -> Arm:
    """Read the pruning of the flags, else what the checkpoint at `path` was saved with."""
    if args.visual_token_num is not None:
        if args.keep_tokens is not None or args.keep_ratio is not None:
            raise UserInputError("--visual_token_num and --keep-tokens are one setting; give one")
        args.keep_tokens = args.visual_token_num
        print(
            f"note: --visual_token_num {args.keep_tokens} is read as --keep-tokens", file=sys.stderr
        )
    arm = arm_of(pruning_from(args) or saved_pruning(path))
    # Its file has no other arm, so the name needs no budget.
    return replace(arm, name=arm.method, label=arm.method)


# LLaVA's (some with underscores, as there), those of pruning, and ours.
COMMON_FLAGS = (
    add_answering_flags,
    path_flag("--image-folder", "where images are found by name", required=False, default=Path()),
    path_flag("--question-file"),
    path_flag("--answers-file"),
    flag("--num-chunks", type=int, default=1, help="split the questions into so many parts"),
    flag("--chunk-idx", type=int, default=0, help="and answer those of this one, from 0"),
    flag("--temperature", type=float, default=0.2, help="0 is greedy"),
    flag("--top_p", type=float, help="sample from the likeliest tokens of this total probability"),
    flag("--num_beams", type=int, default=1),
    flag("--batch-size", type=positive, default=1, help="questions per batch"),
    flag("--visual_token_num", type=int, help="other name of --keep-tokens, as in CDPruner's code"),
)
LETTER_FLAG = flag(
    "--single-pred-prompt", action="store_true", help="ask for the option's letter alone"
)


@program("llava.eval.model_vqa", *COMMON_FLAGS)
def model_vqa(args: Namespace) -> int:
    """Answer a question file about images, at length."""
    return answer_file(JsonLines(args.question_file, args.image_folder), args)


@program(
    "llava.eval.model_vqa_loader",
    *COMMON_FLAGS,
    flag("--max_new_tokens", type=int, default=128),
)
def model_vqa_loader(args: Namespace) -> int:
    """Answer a question file about images."""
    return answer_file(JsonLines(args.question_file, args.image_folder), args)


@program("llava.eval.model_vqa_science", *COMMON_FLAGS, LETTER_FLAG)
def model_vqa_science(args: Namespace) -> int:
    """Answer LLaVA's ScienceQA file."""
    suffix = OPTION_LETTER if args.single_pred_prompt else ""
    return answer_file(ScienceQAFile(args.question_file, args.image_folder, suffix), args)


@program(
    "llava.eval.model_vqa_mmbench",
    *COMMON_FLAGS,
    flag("--all-rounds", action="store_true", help="ask with the options in every rotation"),
    LETTER_FLAG,
    flag("--lang", choices=tuple(SUFFIXES), default="en", help="of that request"),
)
def model_vqa_mmbench(args: Namespace) -> int:
    """Answer one of MMBench's tables."""
    suffix = SUFFIXES[args.lang] if args.single_pred_prompt else ""
    return answer_file(MMBenchTable(args.question_file, suffix, args.all_rounds), args)
