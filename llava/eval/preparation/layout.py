"""Writing files below a data root: whole files only, and nothing that is there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import TaskError
from llava.storage import dump_lines, write_atomically


@dataclass(frozen=True)
class Layout:
    """A data root. Every path below is relative to it."""

    root: Path

    def image(self, path: str, cell: Mapping[str, Any] | None) -> None:
        """Write the image of a dataset's cell, {"bytes", "path"}, byte for byte as it is stored.

        An image that exists is kept: images are only ever written whole, so it is complete.
        """
        if self._below(path).exists():
            return
        if not isinstance(cell, Mapping) or not cell.get("bytes"):
            raise TaskError(f"the dataset holds no image for {path}; download it again")
        self.write(path, cell["bytes"])

    def json(self, path: str, value: Any) -> None:
        write_atomically(self._below(path), json.dumps(value, ensure_ascii=False))

    def lines(self, path: str, rows: Iterable[dict[str, Any]]) -> None:
        write_atomically(self._below(path), dump_lines(list(rows)))

    def text(self, path: str, text: str) -> None:
        write_atomically(self._below(path), text)

    def write(self, path: str, content: bytes) -> None:
        """Write a file so that it is complete as soon as it has its name."""
        write_atomically(self._below(path), content)

    def _below(self, path: str) -> Path:
        """The place of a name that somebody else chose. Raises TaskError outside the root."""
        parts = Path(path)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise TaskError(f"refusing to write {path!r}: it leads out of the data root")
        return self.root / parts
