"""One folder that looks like LLaVA's `playground/data/eval`, small."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llava.eval.demo import choices, short_answers
from llava.eval.demo.files import write_json
from llava.utils import UserInputError

DEFAULT_SAMPLES = 48
STAMP = "demo.json"
VERSION = 1  # raise it whenever a writer writes other files

WRITERS: dict[str, Callable[[Path, int], None]] = {
    "gqa": short_answers.write_gqa,
    "vqav2": short_answers.write_vqav2,
    "textvqa": short_answers.write_textvqa,
    "pope": short_answers.write_pope,
    "mme": short_answers.write_mme,
    "scienceqa": choices.write_scienceqa,
    "mmbench": choices.write_mmbench,
    "mmbench-cn": choices.write_mmbench_cn,
    "seed": choices.write_seed,
    "mmmu": choices.write_mmmu,
    "vizwiz": short_answers.write_vizwiz,
    "mmvet": short_answers.write_mmvet,
    "llava-bench": short_answers.write_llava_bench,
}


def write_playground(root: Path, samples: int = DEFAULT_SAMPLES) -> Path:
    """Write about `samples` questions of every benchmark as folder `root`; returns `root`.

    It appears as a whole or not at all. A folder that holds just this already is left as it is.

    Raises:
        UserInputError: `root` holds anything else, which is never touched.
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
    """Whether `root` is this demo playground already; UserInputError if it is anything else."""
    if not root.exists() or not any(root.iterdir()):
        return False
    stamp = root / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return True
    raise UserInputError(
        f"{root} holds other files than this demo's; give an empty or a new folder"
    )
