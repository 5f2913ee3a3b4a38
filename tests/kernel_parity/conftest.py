"""The group triton: kernels on a CUDA GPU, or in Triton's interpreter where there is none."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Choose the interpreter before triton is imported, which is when it looks."""
    if config.getoption("--triton") and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
