"""What decides an answer, and its hash: the run key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava.eval.engine import provenance
from llava.eval.tasks.base import Benchmark
from llava.model.checkpoint import local_checkpoint, read_config
from llava.model.multimodal_encoder.builder import resolve_vision_tower


def identity(config: dict[str, Any], benchmark: Benchmark, path: str, base: str | None) -> Any:
    """`config`, with hashes of checkpoint, data and sources, and the `run_key` over all of it.

    Reads every byte of the weights, loads none. A vision tower that lies in a folder of its own is
    among them. Raises UserInputError for a checkpoint that is not here.
    """
    whole = {
        "config": config,
        "checkpoint_sha256": checkpoint_hash(path),
        "base_sha256": None if base is None else checkpoint_hash(base),
        "data_sha256": benchmark.data_hash(),
        "source_sha256": provenance.hash_sources(),
        "versions": provenance.package_versions(),
    }
    return {"run_key": provenance.hash_json(whole), **whole}


def checkpoint_hash(path: str) -> str:
    """SHA-256 (hex) of a checkpoint and of the tower it refers to."""
    folder = local_checkpoint(path)
    hashes = [provenance.hash_checkpoint(folder)]
    tower = read_config(folder).get("mm_vision_tower")
    if isinstance(tower, str):
        found = Path(resolve_vision_tower(tower, str(folder)))
        if found.is_dir() and not found.resolve().is_relative_to(folder.resolve()):
            hashes.append(provenance.hash_checkpoint(found))
    return hashes[0] if len(hashes) == 1 else provenance.hash_json(hashes)


def machine_settings(device: str) -> dict[str, Any]:
    """Kind of device and number of threads: other ones may round otherwise."""
    kind = torch.device("cpu" if device == "auto" else device).type
    if device == "auto" and torch.cuda.is_available():
        kind = "cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        kind = "cpu"  # as the loader does
    return {"device": kind, "threads": torch.get_num_threads()}
