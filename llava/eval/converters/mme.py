"""MME: its release of questions and answers, and the text files that its calculation reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.converters.answers import Row
from llava.eval.scorers.mme import Key, question_key
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import read_bytes, read_jsonl
from llava.storage import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """LLaVA's `convert_answer_to_mme.py`.

    Reads DIR/answers/EXPERIMENT.jsonl and DIR/MME_Benchmark_release_version, writes
    DIR/eval_tool/answers/EXPERIMENT/CATEGORY.txt; `python -m llava.eval.eval_mme` scores them.
    """
    parser = OneLineParser(prog="convert_answer_to_mme.py", description=__doc__)
    parser.add_argument("--experiment", required=True, help="name of the answer file")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder of MME (default: this)")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        answers = args.dir / "answers" / f"{args.experiment}.jsonl"
        rows = read_jsonl(answers, texts=("question_id", "prompt", "text"))
        lines = mme_lines(rows, read_truth(args.dir / "MME_Benchmark_release_version", "mme"))
        write_categories(args.dir / "eval_tool" / "answers" / args.experiment, lines)
    return 0


def mme_lines(rows: Iterable[Row], truth: Mapping[Key, str]) -> dict[str, list[str]]:
    """{category: lines "file, question, truth, answer" joined by tabs} for MME's scorer.

    Args:
        rows: {question_id: "category/image", prompt, text}, the two of an image side by side.
        truth: {(category, text file, question): answer}, MME's own files.

    Raises:
        UserInputError: MME does not ask such a question.
    """
    lines = defaultdict(list)
    for row in rows:
        category, file, question = question_key(row["question_id"], row["prompt"], truth)
        answer = " ".join(row["text"].splitlines()).replace("\t", " ")  # keep to one field
        line = (file, question, truth[category, file, question], answer)
        lines[category].append("\t".join(line))
    return dict(lines)


def answer_files(release: Path, task: str | None = None) -> list[Path]:
    """MME's text files "question, tab, answer", sorted; TaskError if there are none.

    A category is a folder of them, or holds them under `questions_answers_YN` beside `images`.
    """
    files = [*release.glob("*/*.txt"), *release.glob("*/questions_answers_YN/*.txt")]
    if not files:
        how = f"; `python -m llava.eval prepare {task}` gets it" if task else ""
        raise TaskError(f"{release} holds no text files with MME's questions and answers{how}")
    return sorted(files)


def read_truth(release: Path, task: str | None = None) -> dict[Key, str]:
    """{(category, text file, question): answer} of MME's release."""
    truth = {}
    for path in answer_files(release, task):
        category = path.relative_to(release).parts[0]
        for number, line in enumerate(read_lines(path, task), start=1):
            if not line.strip():
                continue
            question, tab, answer = line.strip().partition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise TaskError(f"line {number} of {path} is no question, tab and Yes or No")
            truth[category, path.name, question] = answer.strip()
    return truth


def read_lines(path: Path, task: str | None = None) -> list[str]:
    """Lines of a text file, the last one closed or not; TaskError if it is damaged."""
    try:
        text = read_bytes(path, task).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is damaged, it is not UTF-8: {error}") from error
    return text.removesuffix("\n").split("\n")


def write_categories(folder: Path, lines: Mapping[str, Sequence[str]]) -> list[Path]:
    """Write `folder/CATEGORY.txt` for every category; returns the paths."""
    paths = []
    for category, text in lines.items():
        paths.append(folder / f"{category}.txt")
        write_atomically(paths[-1], "".join(f"{line}\n" for line in text))
    return paths
