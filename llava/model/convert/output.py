"""A folder that appears when all of it is there; what a stopped run had written is used again."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.storage import dump_json, exclusive, read_json, write_atomically
from llava.utils import UserInputError, user_path

_PLAN = "plan.json"


def check_output(output: str | Path) -> Path:
    """Return the absolute path of a folder that is to be made.

    Raises:
        UserInputError: something is there already.
    """
    folder = Path(os.path.abspath(user_path(output)))
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        raise UserInputError(f"{str(folder)!r} exists already; give a new folder as the output")
    return folder


@contextmanager
def new_folder(output: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """Give a hidden folder next to `output` that becomes `output` at the end of the block.

    It stays if the block fails. The next call finds it, and what is in it if it had the same plan.

    Args:
        output: from `check_output`.
        plan: everything that decides what the files will hold, as JSON can hold it.

    Raises:
        UserInputError: another process writes to it, or it cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    with exclusive(partial):
        if not _continues(partial, plan):
            for entry in partial.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
            write_atomically(partial / _PLAN, dump_json(plan))
        yield partial
        for name in (_PLAN, ".lock"):
            (partial / name).unlink()
        try:
            partial.replace(output)
        except OSError as error:
            raise UserInputError(
                f"cannot make {str(output)!r}: {error.strerror}; the converted checkpoint is "
                f"complete in {str(partial)!r}, move it by hand"
            ) from error


def _continues(partial: Path, plan: Mapping[str, Any]) -> bool:
    file = partial / _PLAN
    try:
        return file.is_file() and read_json(file) == plan
    except UserInputError:
        return False
