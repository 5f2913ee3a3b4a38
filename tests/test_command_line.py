"""Errors that a user can fix are one line with the fix and exit code 2; bugs keep a traceback."""

from __future__ import annotations

import pytest
import torch

from llava.command_line import OneLineParser, one_line_errors
from llava.eval import __main__ as eval_command
from llava.eval.commands import table as table_command

SHORTAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of 8 GiB."


def test_a_device_that_is_too_small_names_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors(OneLineParser(prog="chat")):
        raise torch.OutOfMemoryError(SHORTAGE)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(
        "chat: error: the device has too little memory"
    )
    assert "--load-4bit" in line and "CUDA out of memory" in line


def test_so_does_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(args: object) -> int:
        raise torch.OutOfMemoryError(SHORTAGE)

    monkeypatch.setattr(table_command, "run", short)
    assert eval_command.main(["table", "any.json"]) == 2
    assert "--load-4bit" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors(OneLineParser(prog="chat")):
        raise ZeroDivisionError("division by zero")
