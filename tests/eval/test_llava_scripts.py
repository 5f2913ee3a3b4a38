"""LLaVA's command lines: every program has its public name, its flags and one-line errors."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from llava.eval.llava_scripts import Program, convert, score, vqa

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROGRAMS = {
    value.name: value
    for module in (vqa, score, convert)
    for value in vars(module).values()
    if isinstance(value, Program)
}


def test_the_table_has_all_of_them() -> None:
    answering = {f"llava.eval.model_vqa{end}" for end in ("", "_loader", "_mmbench", "_science")}
    scoring = {f"llava.eval.eval_{name}" for name in ("mme", "pope", "science_qa", "textvqa")}
    converting = {path.name for path in SCRIPTS.glob("convert_*.py")}
    assert len(converting) == 7
    assert set(PROGRAMS) == answering | scoring | converting


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_public_name_runs_its_program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        if name.endswith(".py"):
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        else:
            assert importlib.import_module(name).main is PROGRAMS[name]
            runpy.run_path(importlib.import_module(name).__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith(f"usage: {name} ")
    assert " ".join(PROGRAMS[name].description.split()[:4]) in printed


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_flag_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[name]([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{name}: error: the following arguments are required: --")
