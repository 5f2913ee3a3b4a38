"""Rows of public datasets, from the dataset hub or from a folder of their parquet files."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.data.layout import Dataset
from llava.eval.tasks.base import TaskError
from llava.eval.tasks.files import Row


@dataclass(frozen=True)
class Reader:
    """Opens datasets at the hub; with `folder`, their parquet files in there instead.

    `name`: id of another dataset of the same schema, to read instead.
    """

    task: str
    folder: Path | None = None
    name: str | None = None

    def __call__(self, dataset: Dataset) -> Iterator[Row]:
        """Yield rows as dicts. Images are {"bytes", "path"}, as stored and not decoded.

        Raises:
            TaskError: the library is missing, the hub cannot be reached, or there is no such
                dataset, split or column.
        """
        library = _library()
        dataset = replace(dataset, name=self.name or dataset.name)
        where = f"{dataset.name} ({dataset.split})"
        fix = (
            f"connect to the network, or download {dataset.name} elsewhere and give its folder: "
            f"python -m llava.eval prepare {self.task} --from FOLDER"
        )
        if self.folder is not None:
            where, fix = f"{where} in {self.folder}", "download it again"
        try:
            rows = self._open(library, dataset)
            _check_columns(rows, dataset, where)
            for name, feature in rows.features.items():
                if undecoded := _undecoded(library, feature):
                    rows = rows.cast_column(name, undecoded)
            yield from tqdm(rows, desc=where, unit="row", disable=None)
        except TaskError:
            raise
        except Exception as error:  # of the library, of its storage, of parquet: no common base
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TaskError(f"cannot read {where}: {reason}; {fix}") from error

    def _open(self, library: Any, dataset: Dataset) -> Any:
        if self.folder is None:
            return library.load_dataset(dataset.name, dataset.config, split=dataset.split)
        files = _files(self.folder, dataset)
        return library.load_dataset("parquet", data_files=files, split="train", streaming=True)


def _files(folder: Path, dataset: Dataset) -> list[str]:
    """Return the split's parquet files, of a folder of the configuration's name if there is one."""
    found = sorted(folder.rglob("*.parquet"))
    of_config = [path for path in found if dataset.config in path.relative_to(folder).parts]
    files = [
        str(path)
        for path in of_config or found
        if path.name.split(".")[0].split("-")[0] == dataset.split
    ]
    if not files:
        raise TaskError(
            f"{folder} has no {dataset.split}-*.parquet of {dataset.name}"
            + (f" ({dataset.config})" if dataset.config else "")
        )
    return files


def _check_columns(rows: Any, dataset: Dataset, where: str) -> None:
    there = rows.column_names or ()
    missing = [name for name in dataset.columns.split() if name not in there]
    if missing:
        raise TaskError(
            f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(there)}. It is "
            "another dataset or its schema has changed: name one with --dataset"
        )


def _library() -> Any:
    """Import the library and silence its logging: errors are reported once, on one line."""
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            "reading public datasets needs the library datasets: pip install 'llava[data]'; "
            "downloaded originals are put in place without it, see --from"
        ) from error
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _undecoded(library: Any, feature: Any) -> Any:
    """Return the feature that leaves images as bytes; None for one without images."""
    raw = library.Image(decode=False)
    if isinstance(feature, library.Image):
        return raw
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return library.List(raw) if isinstance(inner, library.Image) else None
