"""What the runner, the writers of answer files and the tables know of a benchmark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava.pixels import ORIGINAL
from llava.registry import Registry
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
class Metric:
    """A figure of a benchmark: `value` and its standard error `se` (None: undefined), over n items.

    `scale` is the largest possible value: 100 for percentages, 2000 for MME perception.
    """

    value: float
    se: float | None
    n: int
    scale: float = 100.0


class Benchmark(ABC):
    """One benchmark under one prompt protocol, read from LLaVA's data layout.

    Class attributes:
        name: what `--task` takes.
        title: what tables print.
        protocols: {protocol: one line that says what it is}; the first is the default.
        max_new_tokens: LLaVA's limit for this benchmark.
        headline: key of the metric that tables print by default.
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
    max_new_tokens: ClassVar[int]
    headline: ClassVar[str]
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
        """All prompts in published order."""

    @abstractmethod
    def load_image(self, name: str) -> Image.Image:
        """An image of an item, RGB, read as `self.pixels` says.

        Raises:
            UserInputError: it cannot be read; its items count as failed and the run goes on.
            TaskError: the data as a whole are not this benchmark's; the run stops.
        """

    @abstractmethod
    def data_hash(self) -> str:
        """SHA-256 over the question and annotation files (images by name and size)."""

    @abstractmethod
    def item_score(self, item: Item, answer: str) -> float | None:
        """The answer's own score in [0, 1], for the running score; None where it has none."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Metric]:
        """Every metric of the benchmark, the official formula, from answers in item order.

        Empty where only a server or a grader can score it. Items whose images could not be read
        are left out of both lists.
        """

    def write_submission(
        self, items: Sequence[Item], answers: Sequence[str], folder: Path
    ) -> list[Path]:
        """Write the files that the benchmark's own scorer or server takes; returns their paths.

        Items whose images could not be read have the answer "".
        """
        return []


_BENCHMARKS: Registry[Benchmark] = Registry("task", "llava.eval.tasks", error=TaskError)

register_benchmark = _BENCHMARKS.register
get_benchmark = _BENCHMARKS.get


def list_benchmarks() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(_BENCHMARKS.entries())
