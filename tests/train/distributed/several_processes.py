"""What runs of several processes leave behind, and how to compare it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "run_together.py"
ROOT = Path(__file__).parents[3]


class Together(NamedTuple):
    """What processes of one launch came to.

    Attributes:
        code: the exit code of the launcher.
        errors: what all wrote to stderr.
        folder: holds the output of every run by its name, and what processes report.
    """

    code: int
    errors: str
    folder: Path

    def reports(self, name: str) -> list[dict[str, Any]]:
        """What each process says of a run."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob(f"{name}.*.json"))]


def losses(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a folder holds as safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert found, folder
    return found


def differences(one: Path, other: Path) -> float:
    """The largest difference of the weights of two folders, which hold the same."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return max(float((first[k].float() - second[k].float()).abs().max()) for k in first)
