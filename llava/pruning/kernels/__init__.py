"""Triton twins of what takes many small steps in torch. Never required: ask `usable` first.

Every module here imports triton, which `import llava` must not; import one where `usable` said yes:

    if usable(gram, gram.shape[-1]):
        from llava.pruning.kernels.max_min import max_min_picks

The torch code they stand for is their specification: the same picks, ties included.
"""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_path

import torch
from torch import Tensor

# A selection is one program that holds a number or two of every token in registers.
MOST_TOKENS = 16_384


def usable(tensor: Tensor, tokens: int = 0) -> bool:
    """Return whether kernels can work on `tensor`, and on that many tokens a row.

    They need triton and a GPU that it compiles for. With TRITON_INTERPRET=1, set before triton is
    imported, they run step by step on the CPU instead, for tests.
    """
    if tokens > MOST_TOKENS or not _has_triton():
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tensor.device.type == "cpu" or tensor.is_cuda
    return tensor.is_cuda and _compiles_for(tensor.device.index)


@cache
def _has_triton() -> bool:
    """Return whether triton is installed; looked up once, as that takes longer than a kernel."""
    return find_spec("triton") is not None


@cache
def _compiles_for(device: int) -> bool:
    """Return whether triton can compile for a GPU: that takes a C compiler and Python's header.

    AMD's GPUs have no such version number; those before NVIDIA's Ampere (8.0) lack bf16.
    """
    compiler = os.environ.get("CC") or which("gcc") or which("clang")
    new_enough = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
    header = Path(get_path("include"), "Python.h").exists()
    return bool(compiler and header and new_enough)
