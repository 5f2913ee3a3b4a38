"""Say what a run is made of: its key, hashes of files, versions, source commit, machine."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llava.eval.engine.request import Arm, RunRequest
from llava.model.checkpoint import local_checkpoint, read_config
from llava.model.multimodal_encoder.builder import resolve_vision_tower
from llava.pruning.precision import multiplies_bf16_fast
from llava.utils import user_path

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# Everything that can change an answer. Tables, plots and the command line cannot.
ANSWER_SOURCES = (
    "*.py",
    "families/**/*.py",
    "model/**/*.py",
    "pruning/**/*.py",
    "world/**/*.py",
    "eval/engine/batches.py",
    "eval/engine/decode.py",
    "eval/engine/images.py",
    "eval/engine/request.py",
    "eval/engine/runner.py",
    "eval/prompts.py",
    "eval/rules/*.py",
    "eval/tasks/*.py",
)
CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".bin", ".model")


def identify(request: RunRequest) -> dict[str, Any]:
    """Return the settings of a run, hashes of all that decides an answer, and the `run_key`.

    Reads every byte of the weights, loads none. A vision tower in a folder of its own is one of
    them.

    Raises:
        UserInputError: a checkpoint that is not here, or nothing to ask.
    """
    model = request.model
    items = request.plan().items
    asked = [[i.index, i.question_id, i.images, i.text, i.question] for i in items]
    config = {
        **request.settings(),
        "items": len(items),
        "items_sha256": hash_json(asked),
        "device": kind_of_device(model.device),
        # Other numbers of threads may round differently.
        "threads": torch.get_num_threads(),
        # `compute=auto` goes by it.
        "bf16_products": multiplies_bf16(model.device),
        **hash_option_files(request.arms),
    }
    whole = {
        "config": config,
        "checkpoint_sha256": checkpoint_hash(model.path),
        "base_sha256": None if model.base is None else checkpoint_hash(model.base),
        "data_sha256": request.benchmark.data_hash(),
        "source_sha256": hash_sources(),
        "versions": package_versions(),
    }
    return {"run_key": hash_json(whole), **whole}


def checkpoint_hash(path: str) -> str:
    """Return the SHA-256 (hex) of a checkpoint and of the tower it refers to."""
    folder = local_checkpoint(path)
    hashes = [hash_checkpoint(folder)]
    tower = read_config(folder).get("mm_vision_tower")
    if isinstance(tower, str):
        found = Path(resolve_vision_tower(tower, str(folder)))
        if found.is_dir() and not found.resolve().is_relative_to(folder.resolve()):
            hashes.append(hash_checkpoint(found))
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def kind_of_device(device: str) -> str:
    """Return the type of the device that the loader chooses: another one may round differently."""
    kind = torch.device("cuda" if device == "auto" else device).type
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else kind


def multiplies_bf16(device: str) -> bool:
    """Return whether scores of 16-bit models come from bfloat16 products (`compute=auto`)."""
    return multiplies_bf16_fast(torch.device(kind_of_device(device)))


def hash_json(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON form of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_option_files(arms: Iterable[Arm]) -> dict[str, dict[str, str]]:
    """Hash the files that options of methods between layers name, such as heads and curves.

    Returns:
        `files_sha256`, the hashes by path; nothing if no option names a file.
    """
    files = {user_path(file) for arm in arms if arm.decoder for file in arm.decoder.pruner.files}
    found = {str(file): hash_files([file], file.parent) for file in files}
    return {"files_sha256": found} if found else {}


def hash_files(files: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 (hex) over relative names and contents of `files`, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as handle:  # weights may be larger than memory
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def hash_checkpoint(path: Path) -> str:
    """Return the SHA-256 (hex) of configuration, weights and tokenizer; benchmarks are left out."""
    files = [
        file
        for file in path.rglob("*")
        if (file.suffix in CHECKPOINT_SUFFIXES or file.name == "merges.txt")
        and file.is_file()
        and "benchmark" not in file.relative_to(path).parts
    ]
    return hash_files(files, path)


def hash_sources() -> str:
    """Return the SHA-256 (hex) of the source files that take part in making an answer."""
    files = {file for pattern in ANSWER_SOURCES for file in PACKAGE_ROOT.glob(pattern)}
    return hash_files(files, PACKAGE_ROOT)


def package_versions() -> dict[str, str]:
    """Return versions of the interpreter and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "pillow", "llava"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that is not installed
            found[name] = "not installed"
    return found


def git_state(package: Path = PACKAGE_ROOT) -> dict[str, Any] | None:
    """Return commit and dirty flag of the checkout of a package; None outside of one."""
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain"))}


def machine(device: str) -> dict[str, Any]:
    """Describe where the run happened, which timings depend on."""
    described = {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
        "bf16_products": multiplies_bf16(device),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _git(package: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(package), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
