"""The README's lines of use run as they stand there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_lines_of_use(
    hf_llava_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```pycon\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    (tmp_path / "llava-tiny-hf").symlink_to(hf_llava_tiny)
    (tmp_path / "playground").symlink_to(ROOT / "playground")
    monkeypatch.chdir(tmp_path)
    lines = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    runner = doctest.DocTestRunner()
    problems: list[str] = []
    runner.run(lines, out=problems.append)
    assert not problems, "".join(problems)
    assert len(lines.examples) >= 10
    picture = Image.open(ROOT / "playground" / "llava-tiny" / "example.png")
    kept = Image.open("kept.png")
    assert kept.size == picture.size
    assert kept.tobytes() != picture.convert("RGB").tobytes()
