"""MME: 14 categories of yes/no questions, two about each image.

Source of the score: the evaluation tool of MME (Fu et al., 2023), accuracy plus "both right".
"""

import math
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from llava import constants
from llava.eval.data.layout import Dataset, Layout, Read
from llava.eval.tasks.base import Item, Metric, Sources, TaskError, register_benchmark
from llava.eval.tasks.files import SHORT_ANSWER, Row, how_to_get, read_bytes
from llava.eval.tasks.published import ARCHIVE, PublishedQuestions, answer_lines, question_line
from llava.storage import write_atomically
from llava.utils import UserInputError

RELEASE = "MME/MME_Benchmark_release_version"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
CATEGORY_MAXIMUM = 200.0
YES_OR_NO = "Please answer yes or no."

Key = tuple[str, str, str]
ROWS = Dataset("lmms-lab/MME", "question_id question answer category image")


def decide(text: str) -> Literal["yes", "no", "other"]:
    """Read an answer as MME does: "yes", else "no", among its first four characters."""
    head = text.lower()[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


def category_score(right: Sequence[Sequence[bool]]) -> Metric:
    """Return 100 x accuracy + 100 x share of images with both answers right, of one category.

    `right` [images, 2] says which answers are. The score is the mean over images of 50 points for
    each right answer and 100 more for both; its standard error is that of this mean.
    """
    points = [50.0 * sum(pair) + 100.0 * all(pair) for pair in right]
    count = len(points)
    mean = math.fsum(points) / count
    squares = math.fsum((value - mean) ** 2 for value in points)
    se = math.sqrt(squares / (count - 1) / count) if count > 1 else None
    return Metric(mean, se, 2 * count, CATEGORY_MAXIMUM)


def total(scores: Collection[Metric]) -> Metric:
    """Add up category scores; their errors count as independent, they are about other images."""
    errors = [score.se for score in scores if score.se is not None]
    return Metric(
        math.fsum(score.value for score in scores),
        math.hypot(*errors) if len(errors) == len(scores) else None,
        sum(score.n for score in scores),
        math.fsum(score.scale for score in scores),
    )


def question_key(question_id: str, prompt: str, truth: Container[Key]) -> Key:
    """Return (category, text file, question) of LLaVA's `prompt` in MME's own files.

    LLaVA replaces "Please answer yes or no." by its own instruction. MME has one or two spaces in
    front of it, so whichever of the two is in `truth` is meant.

    Raises:
        UserInputError: `truth` has neither.
    """
    category, name = question_id.split("/")[0], question_id.split("/")[-1]
    file = name.split(".")[0] + ".txt"
    question = prompt
    if constants.SHORT_ANSWER in prompt:
        question = prompt.replace(constants.SHORT_ANSWER, "").strip()
    if YES_OR_NO not in question:
        one_space = f"{question} {YES_OR_NO}"
        known = (category, file, one_space) in truth
        question = one_space if known else f"{question}  {YES_OR_NO}"
    if (category, file, question) not in truth:
        raise UserInputError(
            f"MME's {category}/{file} does not ask {question!r}; do the question file and "
            "MME_Benchmark_release_version belong together?"
        )
    return category, file, question


def mme_lines(rows: Iterable[Row], truth: Mapping[Key, str]) -> dict[str, list[str]]:
    """Return {category: lines "file, question, truth, answer" joined by tabs} for MME's scorer.

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
    """Return MME's text files "question, tab, answer", sorted; TaskError if there are none.

    A category is a folder of them, or has them under `questions_answers_YN`, next to `images`.
    """
    files = [*release.glob("*/*.txt"), *release.glob("*/questions_answers_YN/*.txt")]
    if not files:
        raise TaskError(
            f"{release} has no text files with MME's questions and answers{how_to_get(task)}"
        )
    return sorted(files)


def read_truth(release: Path, task: str | None = None) -> dict[Key, str]:
    """Read {(category, text file, question): answer} of MME's release."""
    truth = {}
    for path in answer_files(release, task):
        category = path.relative_to(release).parts[0]
        for number, line in enumerate(read_lines(path, task), start=1):
            if not line.strip():
                continue
            question, tab, answer = line.strip().partition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise TaskError(f"line {number} of {path} must be a question, a tab and Yes or No")
            truth[category, path.name, question] = answer.strip()
    return truth


def read_lines(path: Path, task: str | None = None) -> list[str]:
    """Read lines of a text file, the last one closed or not; TaskError if it is damaged."""
    try:
        text = read_bytes(path, task).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is damaged, it is not UTF-8: {error}") from error
    return text.removesuffix("\n").split("\n")


def write_categories(folder: Path, lines: Mapping[str, Sequence[str]]) -> list[Path]:
    """Write `folder/CATEGORY.txt` for every category; return the paths."""
    paths = []
    for category, text in lines.items():
        paths.append(folder / f"{category}.txt")
        write_atomically(paths[-1], "".join(f"{line}\n" for line in text))
    return paths


@register_benchmark
class MME(PublishedQuestions):
    """Perception (of 2000) and cognition (of 800).

    The error of a category is that of the mean over its images; those of sums take categories as
    independent. Both questions about an image carry one question id.
    """

    name = "mme"
    title = "MME"
    protocols: ClassVar[Mapping[str, str]] = {
        "llava": "single word or phrase, instead of yes or no"
    }
    headline = "perception"
    image_path = RELEASE
    question_path = "MME/llava_mme.jsonl"
    unique_ids = False

    def annotation_files(self) -> list[Path]:
        return answer_files(self.root / RELEASE, self.name)

    def annotate(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        truth = read_truth(self.root / RELEASE, self.name)
        keys = [question_key(str(row["question_id"]), row["text"], truth) for row in rows]
        pairs = defaultdict(list)
        for category, file, question in keys:
            pairs[category, file].append(question)
        for (category, file), questions in pairs.items():
            if category not in PERCEPTION + COGNITION:
                raise TaskError(f"{self.question_file()} asks for {category!r}, which MME lacks")
            if len(questions) != 2:
                raise TaskError(
                    f"{self.question_file()} must ask two questions about "
                    f"{category}/{file.removesuffix('.txt')}, it asks {questions}"
                )
        return ({"key": list(key), "answer": truth[key]} for key in keys)

    def item_score(self, item: Item, answer: str) -> float:
        return float(decide(answer) == item.data["answer"].lower())

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """Return `perception`, `cognition`, `total`, and every category under its name.

        A limited run may end between the two questions of an image: that image does not count.
        The scale of a sum is that of the categories that are there.
        """
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for item, answer in zip(items, answers, strict=True):
            category, file, _ = item.data["key"]
            right[category][file].append(self.item_score(item, answer) == 1)
        scores = {}
        for name in PERCEPTION + COGNITION:
            complete = [pair for pair in right[name].values() if len(pair) == 2]
            if complete:
                scores[name] = category_score(complete)
        groups = {
            "perception": [scores[name] for name in PERCEPTION if name in scores],
            "cognition": [scores[name] for name in COGNITION if name in scores],
            "total": list(scores.values()),
        }
        return {name: total(group) for name, group in groups.items() if group} | scores

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """Write `mme/CATEGORY.txt`, what MME's calculation reads."""
        truth = {tuple(item.data["key"]): item.data["answer"] for item in items}
        return write_categories(folder / "mme", mme_lines(answer_lines(items, answers), truth))

    def sources(self) -> Sources:
        return Sources(
            count=2_374,
            files=[self.question_file()],
            images=self.image_folder(),
            originals=f"{ARCHIVE}, and MME_Benchmark_release_version.zip",
            build=self.build,
            tree=self.image_folder(),
        )

    def build(self, read: Read, layout: Layout) -> None:
        """Make the release's text files too: question, tab, answer."""
        texts, prompts = defaultdict(list), []
        for row in read(ROWS):
            name, question = row["question_id"], row["question"].strip()
            layout.image(self.image_folder() / name, row["image"])
            texts[Path(name).with_suffix(".txt")].append(f"{question}\t{row['answer']}\n")
            text = question.removesuffix(YES_OR_NO).rstrip() + SHORT_ANSWER
            prompts.append(question_line(name, name, text, row["category"]))
        for file, lines in texts.items():
            layout.write(self.image_folder() / file, "".join(lines))
        layout.lines(self.question_file(), prompts)
