"""Keep account of the samples that a run cannot use and goes on without."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from llava.model.checkpoint import read_json_object
from llava.storage import dump_json, write_atomically

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.json"
_LINES = 20


class SkippedSamples:
    """Know which samples could not be used, over all workers of a process.

    Workers of a data loader are processes of their own, so what they find is noted in memory that
    they share.

    Args:
        faults: what is wrong with samples that were left out at once, by name.
        count: number of the samples that are left.
    """

    def __init__(self, faults: Mapping[str, str], count: int) -> None:
        self.faults = dict(faults)
        self._found = torch.zeros(count, dtype=torch.bool).share_memory_()
        for number, fault in enumerate(self.faults.values(), 1):
            _report(number, fault)

    def add(self, index: int, fault: str) -> None:
        """Note a sample that turns out not to be usable, and say so once."""
        if not self._found[index]:
            self._found[index] = True
            _report(len(self.faults) + int(self._found.sum()), fault)

    def found(self) -> list[int]:
        """Return the samples that were noted, by any process that trains."""
        found = self._found.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, found.nonzero().flatten().tolist())
            for part in parts:
                found[part] = True
        return found.nonzero().flatten().tolist()


def _report(number: int, fault: str) -> None:
    if number <= _LINES:
        logger.warning("skipped %s", fault)
    elif number == _LINES + 1:
        logger.warning("skipped more samples than %d; %s lists all", _LINES, SKIPPED_FILE)


def write_skipped(faults: Mapping[str, str], folder: Path, goes_on: bool = False) -> None:
    """Write what is wrong with the samples that were skipped to `skipped.json`, by their names.

    Args:
        faults: by name.
        folder: of the run.
        goes_on: keep what the file of the run's first part lists.
    """
    file = folder / SKIPPED_FILE
    before = read_json_object(file) if goes_on and file.is_file() else {}
    write_atomically(file, dump_json({**before, **faults}))
