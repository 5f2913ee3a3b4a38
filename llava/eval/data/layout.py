"""Writing files below a data root: whole files only, and nothing that is there already."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import Row
from llava.storage import dump_lines, write_atomically


@dataclass(frozen=True)
class Dataset:
    """One split of a public dataset.

    Ids are those that lmms-eval published (its newer releases read copies that need a login);
    `prepare --dataset` names another.

    Attributes:
        name: id at the dataset hub.
        columns: names of the columns that we read, separated by spaces.
        config: configuration; None: the only one.
    """

    name: str
    columns: str
    split: str = "test"
    config: str | None = None


Read = Callable[[Dataset], Iterator[Row]]


@dataclass(frozen=True)
class Layout:
    """A data root that files are written to."""

    root: Path

    def image(self, path: Path, cell: Mapping[str, Any] | None) -> None:
        """Write the image of a dataset's cell, {"bytes", "path"}, byte for byte as it is stored.

        An image that exists is kept: images are only ever written whole, so it is complete.
        """
        self._check(path)
        if not path.exists():
            self.write(path, image_bytes(cell, f"{path}"))

    def json(self, path: Path, value: Any) -> None:
        self.write(path, json.dumps(value, ensure_ascii=False))

    def lines(self, path: Path, rows: Iterable[Row]) -> None:
        self.write(path, dump_lines(list(rows)))

    def write(self, path: Path, content: str | bytes) -> None:
        """Write a file so that it is complete as soon as it has its name."""
        self._check(path)
        write_atomically(path, content)

    def _check(self, path: Path) -> None:
        """Refuse a name, chosen by others, that leads out of the root.

        Raises:
            TaskError: the name does.
        """
        inside = path.is_relative_to(self.root) and path != self.root
        if not inside or ".." in path.relative_to(self.root).parts:
            raise TaskError(f"refusing to write {str(path)!r}: it leads out of the data root")


def image_bytes(cell: Mapping[str, Any] | None, what: str) -> bytes:
    """Return the bytes in an image cell of a dataset.

    Raises:
        TaskError: there are none; the message names `what`.
    """
    if not isinstance(cell, Mapping) or not cell.get("bytes"):
        raise TaskError(f"the dataset has no image for {what}; download it again")
    return cell["bytes"]
