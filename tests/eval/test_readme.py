"""Figures in README and docs are those of tracked result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava.eval.engine.schema import read_result
from llava.eval.report.result import drift
from llava.markdown import markers
from llava.pruning import get_method, list_methods

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "playground" / "results" / "llava-tiny.json"
DECODER = RESULT.with_name("llava-tiny-decoder.json")
SPEED = ROOT / "playground" / "results" / "stage-h200.json"
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
PERCENT = r"\d+\.\d %"


def without_tables(file: Path) -> str:
    """Text of a file without its generated sections."""
    text = file.read_text()
    for name in ("llava-tiny", "llava-tiny-short", "llava-tiny-decoder"):
        begin, end = markers(name)
        before, start, rest = text.partition(begin)
        if start:
            text = before + rest.partition(end)[2]
    return text


def accuracy() -> dict[str, str]:
    return {row["arm"]: f"{100 * row['accuracy']:.1f} %" for row in read_result(RESULT)["rows"]}


@pytest.mark.parametrize(
    ("file", "section", "result"),
    [
        (README, "llava-tiny-short", RESULT),
        (RESULTS, "llava-tiny", RESULT),
        (RESULTS, "llava-tiny-decoder", DECODER),
    ],
    ids=["README", "results", "between layers"],
)
def test_tables_are_those_of_the_tracked_result(file: Path, section: str, result: Path) -> None:
    begin, end = markers(section)
    content = file.read_text().partition(begin)[2].partition(end)[0]
    assert content.count("\n| ") > 10
    assert drift(file, result) is None


@pytest.mark.parametrize("file", [RESULT, DECODER], ids=["all", "between layers"])
def test_the_tracked_result_is_a_full_run(file: Path) -> None:
    result = read_result(file)
    assert result["run"]["status"] == "done"
    assert result["config"]["limit"] == 0
    assert result["questions"] >= 2000
    assert result["images"] >= 600


@pytest.mark.parametrize(
    ("file", "arms"),
    [
        (README, ("least-sensitive@64", "no-image")),
        (
            RESULTS,
            ("divprune@64", "zoo-exact@64", "zoo@64", "random@64", "least-sensitive@64"),
        ),
    ],
    ids=["README", "results"],
)
def test_prose_about_accuracy_repeats_its_cells(file: Path, arms: tuple[str, ...]) -> None:
    figures = accuracy()
    text = without_tables(file).partition("## Speed on a GPU")[0]
    assert re.findall(PERCENT, text) == [figures[arm] for arm in arms]


def test_counts_in_the_readme() -> None:
    text = README.read_text()
    methods = [name for name in list_methods() if not get_method(name).control]
    assert f"{len(methods)} methods behind one" in text
    assert f"over {read_result(RESULT)['questions']:,} questions" in text


def speed() -> tuple[dict, dict[tuple[str, str], str]]:
    """The result file of the stage's times, and its medians by method and column title."""
    result = json.loads(SPEED.read_text())
    cells = {
        (row["method"], f"{row['tokens']:,} → {row['keep']}"): f"{row['median_ms']:.1f}"
        for row in result["rows"]
    }
    return result, cells


def test_the_table_of_times_is_that_of_its_file() -> None:
    result, cells = speed()
    section = RESULTS.read_text().partition("## Time of the pruning stage")[2].partition("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    columns = table[0][1:]
    shown = {
        (method, column): cell
        for method, *row in table[2:]
        for column, cell in zip(columns, row, strict=True)
    }
    assert shown == cells
    words = " ".join(section.split())
    assert result["machine"]["gpu"] in words and "before any work on speed" in words
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16"} and "in bfloat16" in words
    assert f"`{result['command']}` at commit {result['commit']['commit']}" in words
    waits = [row["waits"] for row in result["rows"]]
    assert f"the GPU {min(waits)} to {max(waits)} times per call" in words


def test_times_in_the_readme() -> None:
    result, cells = speed()
    text = " ".join(README.read_text().split())
    (line,) = re.findall(r"\*\*Speed\.\*\*.*?GPU\.", text)
    budget = "576 → 64"
    assert re.findall(r"\d+\.\d ms", line) == [
        f"{cells[method, budget]} ms" for method in ("zoo", "zoo-exact")
    ]
    assert budget in line and "before any work on speed" in line
    assert result["machine"]["gpu"].removeprefix("NVIDIA ") in line
