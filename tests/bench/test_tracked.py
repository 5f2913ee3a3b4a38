"""Tables and figures of speed in documents are those of the tracked files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava.bench.ratios import render_ratios
from llava.bench.schema import read_bench
from llava.bench.summary import Figures, figures_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "playground" / "results"
FILES = sorted(RESULTS.glob("bench-*.json"))


def test_there_are_results() -> None:
    assert len(FILES) >= 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_document_shows_the_file(file: Path) -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    begin, end = f"<!-- {file.stem}:begin -->\n", f"\n<!-- {file.stem}:end -->"
    shown = text.partition(begin)[2].partition(end)[0]
    assert shown == render_ratios(read_bench(file))


def arm(file: str, name: str) -> Figures:
    figures = figures_of(read_bench(RESULTS / file))
    (found,) = (f for f in figures if f.arm["arm"] == name and f.arm["source"] == "this")
    return found


@pytest.mark.parametrize(
    ("file", "name"),
    [("bench-llava-1.5-7b-cpu.json", "zoo-exact@64"), ("bench-zoo-cpu.json", "zoo@64")],
)
def test_the_readme_quotes_the_file(file: str, name: str) -> None:
    own = arm(file, name)
    assert own.of_free_prefill is not None
    method = name.partition("@")[0]
    text = " ".join((ROOT / "README.md").read_text().split())
    speed_up, share = own.prefill_speed_up.median, own.of_free_prefill.median
    quoted = rf"{speed_up:.1f} times as fast with `{method}`[^()]*\({share:.3f}\b"
    assert re.search(quoted, text[text.index("**Speed.**") :])
