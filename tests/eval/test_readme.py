"""The figures in the README come from the tracked result file."""

from __future__ import annotations

from pathlib import Path

from llava.eval.results import read_result
from llava.eval.tables import readme_drift

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "playground" / "results" / "llava-tiny.json"


def test_readme_shows_the_tracked_result() -> None:
    assert readme_drift(ROOT / "README.md", RESULT) is None


def test_the_tracked_result_is_a_full_run() -> None:
    result = read_result(RESULT)
    assert result["run"]["status"] == "done"
    assert result["config"]["limit"] == 0
    assert result["questions"] >= 2000
    assert result["images"] >= 600
