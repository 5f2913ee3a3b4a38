"""Weights from one checkpoint to another, bit for bit; one new file in memory at a time."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava.model.checkpoint import opened_weights
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError

SHARD_BYTES = 5_000_000_000


class Weight(NamedTuple):
    """A weight of the new checkpoint, and where it is read.

    Attributes:
        name: in the new files.
        file: that it is read from.
        key: its name there.
        value: shape and type as they are read; a tensor on the meta device.
        rows: number of rows that it gets; None for those it has. Rows at the end are left out, or
            filled with copies of `filling`.
        filling: a row of the weight.
    """

    name: str
    file: Path
    key: str
    value: torch.Tensor
    rows: int | None = None
    filling: int = 0

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        count = self.value.numel()
        if self.rows is not None:
            count = count // len(self.value) * self.rows
        return count * self.value.element_size()

    def resized(self, read: torch.Tensor) -> torch.Tensor:
        """Return what was read with as many rows as the new weight has."""
        if self.rows is None or self.rows == len(read):
            return read
        if self.rows < len(read):
            return read[: self.rows].clone()
        more = read[self.filling].expand(self.rows - len(read), *read.shape[1:])
        return torch.cat([read, more])


def plan_shards(weights: Iterable[Weight], limit: int = SHARD_BYTES) -> dict[str, list[Weight]]:
    """Divide weights, in the order given, over files of at most `limit` bytes of tensors.

    A weight larger than that gets a file of its own.

    Returns:
        The weights of each file by its name, as transformers names them.
    """
    shards: list[list[Weight]] = []
    room = 0
    for weight in weights:
        if not shards or weight.size > room:
            shards.append([])
            room = limit
        shards[-1].append(weight)
        room -= weight.size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{n:05}-of-{count:05}.safetensors": s for n, s in enumerate(shards, start=1)}


def write_shards(folder: Path, shards: dict[str, list[Weight]]) -> None:
    """Write the files of a plan that are not in `folder` yet, and their index.

    A file appears under its name when it is complete. Peak memory is one file's tensors, and one
    weight more where rows are added or left out.

    Raises:
        UserInputError: a source file is damaged, or there is no room.
    """
    for name, weights in shards.items():
        if not (folder / name).is_file():
            _write(folder / name, _read(weights))
    if len(shards) > 1:
        total = sum(weight.size for weights in shards.values() for weight in weights)
        where = {weight.name: name for name, weights in shards.items() for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_atomically(folder / "model.safetensors.index.json", dump_json(index))


def _read(weights: Sequence[Weight]) -> dict[str, torch.Tensor]:
    tensors = {}
    for file, group in groupby(weights, key=lambda weight: weight.file):
        with opened_weights(file) as read:
            for weight in group:
                tensors[weight.name] = weight.resized(read(weight.key))
    return tensors


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = file.with_name(f".{file.name}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserInputError(
            f"cannot write {file}: {error}; make room and run the same command again, it keeps the "
            "files that are complete"
        ) from error
