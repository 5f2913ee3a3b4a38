"""Every kernel compiles for sm_80 and sm_90 at real sizes, and fits; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

# Registers of one multiprocessor, and shared memory that one program of sm_80 may use.
REGISTERS, SHARED = 65_536, 163 * 1024


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Kernel -> what it needs."""
    program = Path(__file__).with_name("compile_kernels.py")
    root = str(program.parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": root}
    folder = str(tmp_path_factory.mktemp("kernels"))
    run = subprocess.run(
        [sys.executable, str(program), folder], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_all_compile_and_fit(needs: dict[str, dict]) -> None:
    assert len(needs) == 2 * 30
    for name, need in needs.items():
        assert need["registers"] * 32 * need["warps"] <= REGISTERS, name
        assert need["shared"] <= SHARED, name


def test_what_runs_often_stays_in_registers(needs: dict[str, dict]) -> None:
    """Up to 2,880 tokens; beyond 8,192 a thread has more numbers than registers."""
    large = ("11520", "16384")
    assert [
        name for name, need in needs.items() if need["stack"] and not set(large) & {*name.split()}
    ] == []


def test_products_in_half_precision_use_tensor_cores(needs: dict[str, dict]) -> None:
    for name, need in needs.items():
        wanted = name.startswith(("triangle bf16", "triangle fp16"))
        assert need["tensor_cores"] == wanted, name
