"""The method in CONTRIBUTING is complete: as a file it passes the whole suite."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pruning_checks as checks
import pytest
import torch

from llava.pruning import PruningError, registry, select
from llava.pruning.__main__ import main
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import DECODER_METHODS, list_decoder_methods

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
    assert lines_of_code(CODE.search(section)[1]) <= 10


def test_it_passes_the_type_checker() -> None:
    """The package is checked with `disallow_untyped_defs`."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a method")[2]
    functions = [
        node
        for node in ast.walk(ast.parse(CODE.search(section)[1]))
        if isinstance(node, ast.FunctionDef)
    ]
    assert functions
    for function in functions:
        assert function.returns is not None, function.name
        assert all(argument.annotation for argument in function.args.args[1:]), function.name


def test_the_methods_here_are_short() -> None:
    files = (ROOT / "llava" / "pruning" / "methods").glob("*.py")
    lines = {file.stem: lines_of_code(file.read_text()) for file in files}
    del lines["__init__"], lines["none"]
    assert min(lines.values()) <= 20
    assert statistics.median(lines.values()) <= 45


def lines_of_code(source: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    spaces = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*spaces, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_the_method_between_layers_keeps_its_budget() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Add a method that prunes between layers")[2]
    list_decoder_methods()  # built-in methods first
    before = set(DECODER_METHODS._entries)
    exec(CODE.search(section)[1], {"__name__": "longest"})
    (added,) = set(DECODER_METHODS._entries) - before
    try:
        config = DecoderConfig(added, keep_tokens=400)
        assert config.plan(576, 576, 32).mean(576, 32) == pytest.approx(400, abs=0.5)
        with pytest.raises(PruningError, match="cannot reach"):
            DecoderConfig(added, keep_tokens=200).plan(576, 576, 32)
    finally:
        del DECODER_METHODS._entries[added]
