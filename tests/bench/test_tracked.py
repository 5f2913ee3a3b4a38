"""Tables and figures of speed in documents are those of the tracked files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava.bench.gpu_report import find_part, render_stage
from llava.bench.ratios import render_ratios
from llava.bench.report import render
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


GPU = RESULTS / "gpu-h200.json"


@pytest.mark.parametrize("name", ["stage alone", "bench llava-1.5-7b", "bench llava-next-7b"])
def test_the_document_shows_parts_of_the_run_on_a_gpu(name: str) -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    section = name.replace(" ", "-")
    shown = text.partition(f"<!-- {section}:begin -->\n")[2]
    result = find_part(read_bench(GPU), name, GPU)
    want = render_stage(result) if name == "stage alone" else render(result)
    assert shown.partition(f"\n<!-- {section}:end -->")[0] == want


def test_the_prose_about_the_gpu_quotes_the_file() -> None:
    """Of both documents: every figure that is written there is one of the run."""
    text = {
        name: " ".join((ROOT / name).read_text().split())
        for name in ("README.md", "docs/results.md")
    }
    found = read_bench(GPU)
    rows = {
        (row["method"], row["tokens"], row["keep"]): row
        for row in find_part(found, "stage alone", GPU)["rows"]
    }
    single, tiled = rows["zoo-exact", 576, 64], rows["zoo-exact", 2880, 640]
    for own in (single, tiled):
        quoted = f"{own['median_ms']:.2f} ms ({own['graph_ms']:.2f} ms as a CUDA graph)"
        assert quoted in text["README.md"] and quoted in text["docs/results.md"]

    def speed_up(part: str, name: str, batch: int) -> str:
        figures = figures_of(find_part(found, part, GPU))
        (own,) = (f for f in figures if f.arm["arm"] == name and f.arm["batch"] == batch)
        return f"{own.prefill_speed_up.median:.2f} times"

    for part, name, batch in (
        ("bench llava-1.5-7b", "zoo-exact@64", 1),
        ("bench llava-1.5-7b", "zoo-exact@64", 8),
        ("bench llava-next-7b", "zoo-exact@160", 1),
    ):
        assert speed_up(part, name, batch) in text["README.md"], (part, batch)
    (counts,) = (p["result"] for p in found["parts"] if p["name"] == "llava-tiny in bfloat16")
    for name, own in counts.items():
        assert re.search(rf"{own['equal']} [^0-9]*`{name}`", text["docs/results.md"]), name


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
