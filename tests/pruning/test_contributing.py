"""The method in CONTRIBUTING is complete: as a file it passes the whole suite."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pruning_checks as checks
import pytest
import torch

from llava.pruning import registry, select
from llava.pruning.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a method")[2]
    file = tmp_path / "peak.py"
    file.write_text(CODE.search(section)[1])
    spec = importlib.util.spec_from_file_location("peak", file)
    assert spec is not None and spec.loader is not None
    registry.list_methods()  # built-in methods first
    before = set(registry.METHODS._entries)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (added,) = set(registry.METHODS._entries) - before
    yield added
    del registry.METHODS._entries[added]


@pytest.mark.parametrize("check", checks.PROMISES, ids=lambda check: check.__name__)
def test_it_keeps_the_promises(name: str, check) -> None:
    check(name)


def test_it_refuses_nan_and_follows_tokens(name: str) -> None:
    checks.check_non_finite_refused(name)
    checks.check_equivariance(name)


def test_it_does_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.zeros(6, 4)
    tokens[4, 0], tokens[1, 3], tokens[2] = 2.0, -3.0, 1.0
    assert select(name, projected=tokens, keep_tokens=2).tolist() == [1, 4]
    assert main(["list"]) == 0
    assert any(line.startswith(f"{name} ") for line in capsys.readouterr().out.splitlines())


def test_it_is_short() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a method")[2]
    lines = [line for line in CODE.search(section)[1].splitlines() if line.strip()]
    assert len([line for line in lines if not line.strip().startswith('"""')]) <= 16
