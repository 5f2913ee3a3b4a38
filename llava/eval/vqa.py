"""LLaVA's answering scripts: its flags and file formats, over the same loop as every other run.

`model_vqa_loader`, `model_vqa`, `model_vqa_science` and `model_vqa_mmbench` differ in the question
file they read; each has its benchmark class and hands it to `main`. An interrupted command goes on
where it stopped when it is given again: what was answered lies beside the answers file, in a hidden
folder, under a key of every setting, so that answers never mix.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from llava.command_line import OneLineParser, one_line_errors
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.arm_words import arm_of, saved_pruning
from llava.eval.arms import UNPRUNED, Arm
from llava.eval.execution import Job, execute
from llava.eval.identity import identity
from llava.eval.plan import Plan, chunk_of
from llava.eval.prompts import bare_question, has_inner_marks
from llava.eval.results import Record, RunFolder
from llava.eval.run import add_answering_flags, describe, find_models, model_of
from llava.eval.sharding import processes
from llava.eval.tasks.base import Benchmark, Item, Metric, TaskError
from llava.eval.tasks.files import image_names, is_file, numbered_jsonl, read_bytes
from llava.images import open_image
from llava.mm_utils import get_model_name_from_path
from llava.pixels import VIEWER
from llava.pruning.flags import pruning_from
from llava.sampling import Sampling
from llava.storage import dump_lines, write_atomically
from llava.utils import UserInputError


class QuestionList(Benchmark):
    """The questions of one file. Subclasses read it; scoring is left to LLaVA's own scripts.

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
        """The questions; `data["prompt"]` is what answer lines repeat, `data["extra"]` goes into
        them as it is."""

    def load_image(self, name: str) -> Image.Image:
        return open_image(self.image_folder / name, self.pixels)

    def data_hash(self) -> str:
        """SHA-256 over the question file, and its images by name and size."""
        digest = hashlib.sha256(read_bytes(self.file))
        for name in sorted({name for item in self.items() for name in item.images}):
            path = self.image_folder / name
            digest.update(f"{name} {path.stat().st_size if is_file(path) else -1}\n".encode())
        return digest.hexdigest()

    def item_score(self, item: Item, answer: str) -> None:
        return None

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        return {}


class JsonLines(QuestionList):
    """LLaVA's usual question file: `question_id, image, text` a line.

    No image is a question of text alone. `image` may also be a list: several pictures, marked in
    the text with `<image>` each, or not at all, in which case they stand in front of it.
    """

    def items(self) -> list[Item]:
        items = []
        for where, row in numbered_jsonl(self.file, ids=("question_id",), texts=("text",)):
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


@dataclass(frozen=True)
class Program:
    """One of LLaVA's scripts: its name and description, what its flags add, what it reads."""

    name: str
    description: str
    benchmark: Callable[[argparse.Namespace], QuestionList]
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def build_parser(program: Program) -> argparse.ArgumentParser:
    """LLaVA's flags (some with underscores, as there), pruning flags and ours."""
    parser = OneLineParser(prog=f"llava.eval.{program.name}", description=program.description)
    add_answering_flags(parser)
    add = parser.add_argument
    add("--image-folder", type=Path, default=Path(), help="where images are found by name")
    add("--question-file", type=Path, required=True)
    add("--answers-file", type=Path, required=True)
    add("--num-chunks", type=int, default=1, help="split the questions into so many parts")
    add("--chunk-idx", type=int, default=0, help="and answer those of this one, from 0")
    add("--temperature", type=float, default=0.2, help="0 is greedy")
    add("--top_p", type=float, help="sample from the likeliest tokens of this total probability")
    add("--num_beams", type=int, default=1)
    add("--batch-size", type=int, default=1, help="questions per batch")
    add("--visual_token_num", type=int, help="other name of --keep-tokens, as in CDPruner's code")
    program.add_flags(parser)
    return parser


def main(program: Program, argv: Sequence[str] | None = None) -> int:
    """Answer the file; 1 if some images could not be read, 2 with one line for unusable input."""
    parser = build_parser(program)
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    args.command_line = shlex.join(["python", "-m", f"llava.eval.{program.name}", *words])
    with one_line_errors(parser):
        return answer_file(program, args)


def answer_file(program: Program, args: argparse.Namespace) -> int:
    """Answer the questions of a chunk of the file and write LLaVA's answer lines, in its order.

    Images that cannot be read give an empty `text` and the reason in `metadata`.
    """
    if args.batch_size < 1 or args.seed < 0 or args.workers < 0:
        raise UserInputError("--batch-size must be at least 1, --seed and --workers at least 0")
    find_models(args)
    benchmark = program.benchmark(args)
    benchmark.pixels = args.pixels or benchmark.pixels
    length = getattr(args, "max_new_tokens", benchmark.max_new_tokens)
    sampling = Sampling(args.temperature, args.top_p, args.num_beams, length)
    arm = asked_arm(args)
    items = chunk_of(benchmark.items(), args.num_chunks, args.chunk_idx)
    with processes() as group:
        if not items:
            group.agree(lambda: write_atomically(args.answers_file, ""))
            return 0
        plan = Plan.of(items, args.batch_size)
        model = model_of(args)
        config = describe(args, benchmark, plan, [arm], model, sampling)
        whole = group.agree(lambda: identity(config, benchmark, args.model_path, args.model_base))
        output = args.answers_file.with_name(f".{args.answers_file.name}.run")
        job = Job(
            model,
            benchmark,
            plan,
            [arm],
            sampling,
            args.seed,
            args.workers,
            output,
            whole,
            args.command_line,
        )
        name = get_model_name_from_path(args.model_path)

        def finish(folder: RunFolder, arms: Sequence[Arm], answers: list[Record]) -> None:
            said = {line["index"]: line for line in answers}
            lines = [answer_line(item, said[item.index], name) for item in items]
            write_atomically(args.answers_file, dump_lines(lines))
            print(f"written: {args.answers_file}")

        return execute(job, group, finish)


def answer_line(item: Item, record: Record, model: str) -> Record:
    """A line of LLaVA's answers files."""
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


def asked_arm(args: argparse.Namespace) -> Arm:
    """The pruning of the flags, else what the checkpoint was saved with, else none."""
    if args.visual_token_num is not None:
        if args.keep_tokens is not None or args.keep_ratio is not None:
            raise UserInputError("--visual_token_num and --keep-tokens are one setting; give one")
        args.keep_tokens = args.visual_token_num
        print(
            f"note: --visual_token_num {args.keep_tokens} is read as --keep-tokens", file=sys.stderr
        )
    arm = arm_of(pruning_from(args) or saved_pruning(args.model_path))
    # The only arm of its file: its budget is in the settings, not in the name.
    return arm if arm.method == UNPRUNED else replace(arm, name=arm.method, label=arm.method)
