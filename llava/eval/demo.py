"""The data of `paper-table --demo`: LLaVA's `playground/data/eval`, small, of drawn scenes."""

import json
import os
import shutil
from pathlib import Path

from llava.utils import UserInputError
from llava.world.benchmark_files import WRITERS, write_json

DEFAULT_SAMPLES = 48
STAMP = "demo.json"
VERSION = 1  # raise it whenever a writer writes other files


def write_playground(root: Path, samples: int = DEFAULT_SAMPLES) -> Path:
    """Write about `samples` questions of every benchmark as folder `root`; return `root`.

    It appears as a whole or not at all. A folder that has exactly these files is left as it is.

    Raises:
        UserInputError: `root` has other files; they are never changed.
    """
    wanted = {"demo": VERSION, "samples": samples, "tasks": sorted(WRITERS)}
    if _holds(root, wanted):
        return root
    draft = root.with_name(f".{root.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for write in WRITERS.values():
            write(draft, samples)
        write_json(draft / STAMP, wanted)
        draft.rename(root)
    except OSError as error:
        if not _holds(root, wanted):  # another process may have been faster
            raise UserInputError(f"cannot write demo data to {root}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _holds(root: Path, wanted: dict) -> bool:
    """Return whether `root` has this demo data already.

    Raises:
        UserInputError: it has anything else.
    """
    if not root.exists() or not any(root.iterdir()):
        return False
    stamp = root / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return True
    raise UserInputError(f"{root} has other files than this demo's; use an empty or a new folder")
