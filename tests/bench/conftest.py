"""Fixtures of the bench's tests: one small bench that all of them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.bench.command import main
from llava.bench.schema import read_bench


@pytest.fixture(scope="session")
def bench_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `llava bench` at its smallest: one layer, two repeats."""
    file = tmp_path_factory.mktemp("bench") / "small.json"
    words = ["--config", "llava-tiny", "--layers", "1", "--repeats", "2", "--answer", "1,3"]
    words += ["--pruner", "zoo-exact,norm", "--keep-tokens", "64,576", "--batch", "1,2"]
    assert main([*words, "--device", "cpu", "--output", str(file)]) == 0
    return file


@pytest.fixture
def bench_result(bench_file: Path) -> Any:
    """What that file holds, read again, so that a test may change it."""
    return read_bench(bench_file)
