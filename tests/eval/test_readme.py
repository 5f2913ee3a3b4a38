"""The figures in the README come from the tracked result file, or there are none."""

from __future__ import annotations

from pathlib import Path

from llava.eval.results import read_result
from llava.eval.tables import BEGIN, END, readme_drift

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "playground" / "results" / "llava-tiny.json"


def test_readme_shows_the_tracked_result() -> None:
    if RESULT.exists():
        assert readme_drift(ROOT / "README.md", RESULT) is None
        result = read_result(RESULT)
        assert result["run"]["status"] == "done"
        assert result["config"]["limit"] == 0
        assert result["questions"] >= 2000
        assert result["images"] >= 600
    else:
        text = (ROOT / "README.md").read_text()
        section = text.partition(BEGIN)[2].partition(END)[0]
        assert BEGIN in text and "|" not in section and "%" not in section
