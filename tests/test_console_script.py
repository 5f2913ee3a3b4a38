"""The console script: every command under one name, and nothing slow before one runs."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import llava
from llava.cli import COMMANDS, main
from llava.eval.__main__ import build_parser
from llava.eval.commands import table as table_command

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    *("chat", "run", "quickstart", "compare", "table", "paper-table", "prepare", "bench"),
    *("convert", "methods", "calibrate", "merge-lora", "extract-projector"),
)


def test_it_is_installed_as_a_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"llava": "llava.cli:main"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(COMMANDS) == set(NAMES)
    for flag in ("--help", "-h"):
        assert main([flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        for name in NAMES:
            (line,) = [line for line in lines if line.split()[:1] == [name]]
            assert len(line.split()) > 3, "one line says what it does"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava {llava.__version__}\n"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["quikstart"], "unknown command 'quikstart'; did you mean 'quickstart'?"),
        (["papertable"], "did you mean 'paper-table' or 'table'?"),
        (["serve"], "unknown command 'serve'; "),
        (["xyzzy"], "valid: bench, calibrate, chat, "),
        ([], "give a command: chat, "),
        ([""], "give a command: chat, "),
    ],
)
def test_an_unknown_command_is_one_line(
    words: list[str], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("llava: error: ") and pattern in captured.err


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from llava.cli import main; main(['--help']); main(['oops']);"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)) or 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert took < 5, "under a second on a machine with nothing else to do"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: llava {name} ")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_flags_are_one_line_of_that_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--no-such-flag"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("llava")
    assert " error: " in error


def test_an_error_while_running_names_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "nowhere.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llava: error: cannot read nowhere.json") and error.count("\n") == 1


def test_the_command_line_is_described_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(table_command, "run", lambda args: seen.append(args.command_line) or 7)
    assert main(["table", "a b.json"]) == 7
    assert import_module("llava.eval.__main__").main(["table", "a b.json"]) == 7
    assert seen == ["llava table 'a b.json'", "python -m llava.eval table 'a b.json'"]


def test_modules_can_still_be_run() -> None:
    (commands,) = [action for action in build_parser()._actions if action.dest == "command"]
    within = {name for name, command in COMMANDS.items() if command.module == "llava.eval.__main__"}
    assert within <= set(commands.choices)
