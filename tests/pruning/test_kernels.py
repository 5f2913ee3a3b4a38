"""Kernels are never required: without triton, or without a GPU, the package does without."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llava.pruning import kernels


class OnGpu:
    """As much of a tensor on a GPU as `usable` looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_cpu_and_meta_tensors_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert not kernels.usable(torch.zeros(1))
    assert not kernels.usable(torch.zeros(1, device="meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.usable(torch.zeros(1))
    assert not kernels.usable(torch.zeros(1, device="meta"))


def test_a_gpu_needs_triton_and_something_to_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compiles = kernels._compiles_for.__wrapped__
    monkeypatch.setattr(kernels, "_compiles_for", compiles)
    monkeypatch.setenv("CC", "cc")
    assert kernels.usable(OnGpu(), kernels.MOST_TOKENS)
    assert not kernels.usable(OnGpu(), kernels.MOST_TOKENS + 1)
    with monkeypatch.context() as old_gpu:
        old_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not kernels.usable(OnGpu())
    with monkeypatch.context() as no_compiler:
        no_compiler.delenv("CC")
        no_compiler.setattr(kernels, "which", lambda name: None)
        assert not kernels.usable(OnGpu())
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not kernels.usable(OnGpu())


def test_importing_the_package_does_not_import_kernels() -> None:
    code = (
        "import sys, llava.pruning\n"
        "from llava.pruning.registry import list_methods\n"
        "list_methods()\n"
        "print([name for name in sys.modules if name.startswith('llava.pruning.kernels.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
