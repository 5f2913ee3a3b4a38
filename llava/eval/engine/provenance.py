"""What a run was made of: hashes of files, versions, source commit, machine."""

from __future__ import annotations

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

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# Everything that can change an answer. Tables, plots and the command line cannot.
ANSWER_SOURCES = (
    "*.py",
    "model/**/*.py",
    "pruning/**/*.py",
    "world/**/*.py",
    "eval/engine/*.py",
    "eval/prompts.py",
    "eval/subject.py",
    "eval/scorers/*.py",
    "eval/tasks/*.py",
)
CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".bin", ".model")


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON form of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 (hex) over relative names and contents of `files`, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as handle:  # weights may be larger than memory
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def hash_checkpoint(path: Path) -> str:
    """SHA-256 (hex) of configuration, weights and tokenizer under `path`, without its benchmark."""
    files = [
        file
        for file in path.rglob("*")
        if file.suffix in CHECKPOINT_SUFFIXES
        and file.is_file()
        and "benchmark" not in file.relative_to(path).parts
    ]
    return hash_files(files, path)


def hash_sources() -> str:
    """SHA-256 (hex) of the package's source files that take part in making an answer."""
    files = {file for pattern in ANSWER_SOURCES for file in PACKAGE_ROOT.glob(pattern)}
    return hash_files(files, PACKAGE_ROOT)


def package_versions() -> dict[str, str]:
    """Versions of the interpreter and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "pillow", "llava"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that is not installed
            found[name] = "not installed"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package lies in; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}


def machine(device: str) -> dict[str, Any]:
    """Where the run happened. Timings mean nothing without it."""
    described = {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
