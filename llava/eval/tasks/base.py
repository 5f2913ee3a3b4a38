"""What the runner, the writers of answer files and the tables know of a benchmark."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.eval.stats import Metric, metric_of
from llava.pixels import ORIGINAL
from llava.registry import Registry
from llava.storage import write_atomically
from llava.utils import UserInputError


class TaskError(UserInputError):
    """Questions, answers or images cannot be used; the message says why."""


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        index: place in the benchmark's published order, from 0.
        question_id: the identity that published files give it.
        images: names of its images for `Benchmark.load_image`, in prompt order; none for text only.
        text: the user's turn after the image marks, suffix included.
        question: the bare question, which instruction-aware methods read.
        data: JSON values that the scorer needs: category, options, reference answers.
    """

    index: int
    question_id: str | int
    images: tuple[str, ...]
    text: str
    question: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """Where the data of a benchmark under one protocol come from, see `llava.eval.data`.

    Attributes:
        count: published number of prompts; None where no publication says it.
        files: files that `prepare --from` may find as they are published.
        images: the folder of images; None where they are in a file.
        originals: what to download for `--from`.
        build: makes `files` and `images` from rows of public datasets, called with a function from
            `Dataset` to rows and the `Layout` to write; None where the datasets lack something.
        with_image: how many of the prompts have an image, where not all do.
        tree: a folder that `--from` may find as a whole.
        images_only: `build` gives images and nothing else.
    """

    count: int | None
    files: Sequence[Path]
    images: Path | None
    originals: str
    build: Callable[[Any, Any], None] | None = None
    with_image: int | None = None
    tree: Path | None = None
    images_only: bool = False


class Benchmark(ABC):
    """One benchmark under one prompt protocol, read from LLaVA's data layout.

    Class attributes:
        name: what `--task` takes.
        title: what tables print.
        protocols: {protocol: one line that says what it is}; the first is the default.
        max_new_tokens: LLaVA's limit for this benchmark.
        headline: key of the metric that tables print by default; "" where there is none.
        submission_file: name of the file that `submission` is the text of; "" without one.
        default_root: data root where `--data-root` is not given.
        pixels: how `load_image` reads pictures, see `llava.pixels`; `--pixels` sets it on the
            instance. Published figures were measured with `original`.

    Raises:
        TaskError: files of it are missing or damaged; the message names them and the
            `python -m llava.eval prepare` command that gets them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    protocols: ClassVar[Mapping[str, str]]
    max_new_tokens: ClassVar[int] = 128
    headline: str = "accuracy"
    submission_file: str = ""
    default_root: ClassVar[Path] = Path("playground/data/eval")
    pixels: str = ORIGINAL

    def __init__(self, root: Path, protocol: str | None = None) -> None:
        protocol = protocol or next(iter(self.protocols))
        if protocol not in self.protocols:
            raise TaskError(
                f"{self.name} has no protocol {protocol!r}; one of {', '.join(self.protocols)}"
            )
        self.root, self.protocol = root, protocol

    @abstractmethod
    def items(self) -> list[Item]:
        """Return all prompts in published order."""

    @abstractmethod
    def load_image(self, name: str) -> Image.Image:
        """Return an image of an item, RGB, read as `self.pixels` says.

        Raises:
            UserInputError: it cannot be read; its items count as failed and the run goes on.
            TaskError: the data as a whole are not this benchmark's; the run stops.
        """

    @abstractmethod
    def data_hash(self) -> str:
        """Return the SHA-256 over the question and annotation files (images by name and size)."""

    def item_score(self, item: Item, answer: str) -> float | None:
        """Return the answer's own score in [0, 1], for the running score; None without one."""
        return None

    def groups(self, items: Sequence[Item]) -> Mapping[str, Sequence[Item]]:
        """Return {metric: the items that it is the mean score of}, for `score`."""
        return {"accuracy": items}

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """Return every metric of the benchmark, the official formula, from answers in item order.

        By default the mean of `item_score` over each of `groups`, with a standard error clustered
        by image; items without a score do not count. Empty where only a server or a grader can
        score. Items whose images could not be read are left out of both lists.
        """
        pairs = zip(items, answers, strict=True)
        scores = {item.index: self.item_score(item, answer) for item, answer in pairs}
        metrics = {}
        for name, group in self.groups(items).items():
            scored = [(item, s) for item in group if (s := scores[item.index]) is not None]
            if scored:
                clusters = [item.images or item.index for item, _ in scored]
                metrics[name] = metric_of([score for _, score in scored], clusters)
        return metrics

    def submission(self, items: Sequence[Item], answers: Sequence[str]) -> str:
        """Return the text of `submission_file`.

        Items whose images could not be read have the answer "".
        """
        raise NotImplementedError

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """Write the files that the benchmark's own scorer or server takes; return their paths."""
        if not self.submission_file:
            return []
        path = folder / self.submission_file
        write_atomically(path, self.submission(items, answers))
        return [path]

    def sources(self) -> Sources | None:
        """Return where its data come from; None for a benchmark that brings its own."""
        return None


_BENCHMARKS: Registry[Benchmark] = Registry("task", "llava.eval.tasks", error=TaskError)
register_benchmark = _BENCHMARKS.register
get_benchmark = _BENCHMARKS.get


def list_benchmarks() -> list[str]:
    """Return the names of all benchmarks, sorted."""
    return sorted(_BENCHMARKS.entries())


def list_prepared() -> list[str]:
    """Return the names of the benchmarks whose data can be prepared, sorted."""
    names = list_benchmarks()
    return [name for name in names if get_benchmark(name).sources is not Benchmark.sources]
