"""Images on their way to the model: read and preprocessed in worker processes, ahead of their use.

An image that cannot be decoded fails alone; what asks about it is reported and the run goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava.eval.tasks.base import Benchmark, TaskError
from llava.families.contract import Picture
from llava.images import PictureError
from llava.utils import UserInputError


@dataclass(frozen=True)
class LoadedImages:
    """Images of one batch.

    Attributes:
        names: those that could be read.
        pictures: of each of `names`.
        failed: the others, with the reason.
    """

    names: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class ImageSource:
    """Reads images of a benchmark and prepares them for a model.

    Args:
        benchmark: the benchmark.
        prepare: as in `VisionLanguageModel`.
    """

    def __init__(self, benchmark: Benchmark, prepare: Callable[[Image.Image], Picture]) -> None:
        self.benchmark, self.prepare = benchmark, prepare

    def load(self, names: Sequence[str]) -> LoadedImages:
        """Load the named images.

        Raises:
            TaskError: the data as a whole are the wrong ones.
            UserInputError: the model's own config does not say how to show it an image.
        """
        loaded = LoadedImages()
        for name in names:
            try:
                image = self.benchmark.load_image(name)
            except TaskError:
                raise
            except UserInputError as error:
                loaded.failed[name] = str(error)
                continue
            try:
                picture = self.prepare(image)
            except PictureError as error:
                loaded.failed[name] = f"image {name}: {error}"
                continue
            loaded.names.append(name)
            loaded.pictures.append(picture)
        return loaded

    def stream(self, batches: Sequence[Sequence[str]], workers: int) -> Iterator[LoadedImages]:
        """Load the images of each batch in turn, ahead in `workers` processes (0: in this one)."""
        loader: DataLoader[Any] = DataLoader(
            batches,  # type: ignore[arg-type]  # any sequence will do
            batch_size=None,
            collate_fn=self._try_load,
            num_workers=workers,
            # The loader draws a seed for its workers; not from the global generator.
            generator=torch.Generator(),
        )
        for loaded in loader:
            if isinstance(loaded, UserInputError):
                raise loaded
            yield loaded

    def _try_load(self, names: Sequence[str]) -> LoadedImages | UserInputError:
        try:
            return self.load(names)
        except UserInputError as error:  # raised in a worker, it would carry the worker's traceback
            return error
