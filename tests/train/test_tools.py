"""The tools that made llava-tiny end on bad input in one line."""

import importlib
import sys
from pathlib import Path

import pytest
import sentencepiece

FILE = "not-a-folder"  # a file where a folder belongs
CALLS = {
    "init_tiny": [FILE],
    "align": ["--model", "nowhere", "--data", "nowhere"],
    "tower": ["--output", FILE, "--steps", "1"],
    "package": ["--checkpoint", "nowhere", "--tokenizer", "nowhere", "--output", "out"],
    "world_data": ["--tower", "nowhere", "--output", "out", "--scenes", "1", "--variants", "1"],
}


@pytest.mark.parametrize("tool", CALLS)
def test_bad_input_is_one_line(
    tool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(FILE).touch()
    monkeypatch.setattr(sys, "argv", [tool, *CALLS[tool]])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"llava.train.tiny.{tool}").main()
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_an_old_sentencepiece_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would end the whole process."""
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.2")
    monkeypatch.setattr(sys, "argv", ["init_tiny", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("llava.train.tiny.init_tiny").main()
    assert stop.value.code == 2
    assert "needs sentencepiece 0.2.3 or newer" in capsys.readouterr().err
