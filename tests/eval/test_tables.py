"""Rows from records, Markdown from rows, and documents that may not drift."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.eval.__main__ import main
from llava.eval.commands.quickstart import plan_arms
from llava.eval.engine.metrics import result_rows
from llava.eval.engine.request import Arm
from llava.eval.engine.schema import SCHEMA_VERSION
from llava.eval.report.plots import draw_accuracy
from llava.eval.report.result import (
    drift,
    family_table,
    full_section,
    main_table,
    notes,
    render,
    short_section,
    summary_table,
)
from llava.markdown import markers
from llava.utils import UserInputError

ARMS = tuple(
    replace(arm, unavailable="no factors") if arm.method == "pool" else arm
    for arm in plan_arms(["none", "zoo", "pool"], [64])
)
CORRECT = {"none": [1, 1, 1, 0], "zoo@64": [1, 0, 1, 0], "no-image": [0, 0, 0, 0]}


def tokens_of(arm: Arm) -> int:
    return 0 if arm.image == "absent" else int(arm.budget or 576)


def answers() -> list[dict]:
    return [
        {
            "arm": arm.name,
            "index": question,
            "images": [f"{question}.png"],
            "category": ("color", "count")[question % 2],
            "tokens_in": tokens_of(arm) - (question if arm.name == "zoo@64" else 0),
            "score": float(CORRECT.get(arm.name, [0, 0, 0, 0])[question]),
        }
        for arm in ARMS
        if not arm.unavailable
        for question in range(4)
    ]


def timings() -> list[dict]:
    """Batch 0 is cold; then zoo's prefill is 1/2, 1/4, 1/5 and its prune 3, 1, 1 of unpruned."""

    def line(batch: int, arm: Arm, prune: float | None, prefill: float) -> dict:
        common = {"batch": batch, "arm": arm.name, "cold": batch == 0, "decode_ms": None}
        return common | {"prune_ms": prune, "prefill_ms": prefill}

    base = [100.0, 10.0, 20.0, 10.0]
    zoo = [(900.0, 900.0), (30.0, 5.0), (20.0, 5.0), (10.0, 2.0)]
    lines = []
    for arm in ARMS:
        for batch in range(4):
            if arm.name == "zoo@64":
                lines.append(line(batch, arm, *zoo[batch]))
            elif not arm.unavailable:
                prune = None if arm.image == "absent" else 0.0
                lines.append(line(batch, arm, prune, base[batch]))
    return lines


@pytest.fixture
def result() -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "questions": 4,
        "images": 4,
        "config": {"batch_size": 2},
        "rows": result_rows(ARMS, answers(), timings()),
        "run": {
            "git": {"commit": "0123456789abcdef", "dirty": True},
            "versions": {"torch": "2.13", "transformers": "5.23"},
            "machine": {"device": "cpu", "torch_threads": 1},
            "command": "python -m llava.eval quickstart --limit 0",
        },
    }


def cells(table: str, label: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_main_table(result: dict) -> None:
    table = main_table(result)
    # 3 of 4: error sqrt(0.25 / 4); 2 of 4: sqrt((1/3) / 4); difference -1 of 4 again 0.25.
    assert cells(table, "none") == ["576", "576", "75.0 ± 25.0", "100.0 %", "—", "0.00", "1.00"]
    assert cells(table, "zoo") == [
        "64",
        "61..64",
        "50.0 ± 28.9",
        "66.7 %",
        "-25.0 ± 25.0",
        "1.00",
        "0.25",
    ]
    assert cells(table, "no image")[1:3] == ["0", "0.0 ± 0.0"]
    assert cells(table, "no image")[-2:] == ["—", "1.00"]


def test_impossible_cell_gives_the_reason_and_no_number(result: dict) -> None:
    text = render(result)
    assert cells(main_table(result), "pool") == ["64", *["n/a"] * 6]
    assert "pool at 64: no factors" in text


def test_summary_has_one_line_per_method(result: dict) -> None:
    table = summary_table(result)
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert header == ["method", "576", "64", "0"]
    assert cells(table, "none") == ["75.0 ± 25.0", "", ""]
    assert cells(table, "zoo") == ["", "50.0 ± 28.9", ""]
    assert cells(table, "pool") == ["", "n/a", ""]
    assert cells(table, "no image") == ["", "", "0.0 ± 0.0"]
    labels = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert labels == list(dict.fromkeys(row["label"] for row in result["rows"]))
    assert render(result).index("| none (unpruned)") == render(result).index(table.splitlines()[2])


def test_a_reason_stands_once_for_all_budgets(result: dict) -> None:
    rows = [row | {"budget": budget} for row in result["rows"] for budget in (64, 32)]
    (note,) = [line for line in notes(result | {"rows": rows}) if "pool" in line]
    assert note == "n/a: pool at 64, 32: no factors."


def many_methods(result: dict, count: int) -> dict:
    (row,) = [row for row in result["rows"] if row["arm"] == "zoo@64"]
    extra = [
        row | {"arm": f"m{i}@{k}", "label": f"method-{i}", "method": f"m{i}", "budget": k}
        for i in range(count)
        for k in (192, 64)
    ]
    for line in extra:
        line["tokens_min"] = line["tokens_max"] = line["budget"]
    return result | {"rows": [*result["rows"], *extra]}


def test_a_plot_of_many_methods_can_be_read(result: dict) -> None:
    figure = draw_accuracy(many_methods(result, 25))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    looks = {(curve.lines[0].get_color(), curve.lines[0].get_marker()) for curve in axes.containers}
    assert len(looks) == len(axes.containers) == 27
    legend, page = axes.get_legend().get_window_extent(), figure.bbox
    assert page.y0 <= legend.y0 and legend.y1 <= page.y1
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1
    # Shifted points stay nearer to their own budget than to any other.
    for curve in axes.containers:
        for x, budget in zip(sorted(curve.lines[0].get_xdata())[-2:], (64, 192), strict=False):
            assert abs(x / budget - 1) < 0.1
    small = draw_accuracy(result)
    assert tuple(small.get_size_inches()) == (8.0, 5.0)


def test_family_table(result: dict) -> None:
    table = family_table(result)
    assert "color (n=2)" in table and "count (n=2)" in table
    assert cells(table, "zoo") == ["64", "100.0 ± 0.0", "0.0 ± 0.0"]
    assert cells(table, "none") == ["576", "100.0 ± 0.0", "50.0 ± 50.0"]


def test_columns_line_up(result: dict) -> None:
    for table in (main_table(result), family_table(result)):
        assert len({len(line) for line in table.splitlines()}) == 1
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_an_unpruned_model_that_knows_nothing(result: dict) -> None:
    wrong = [record | {"score": 0.0} for record in answers()]
    rows = result_rows(ARMS, wrong, timings())
    assert cells(main_table(result | {"rows": rows}), "zoo")[3] == "n/a"


def test_a_run_of_one_batch_has_timings_although_cold() -> None:
    first = [line for line in timings() if line["batch"] == 0]
    rows = {row["arm"]: row for row in result_rows(ARMS, answers(), first)}
    assert rows["zoo@64"]["prefill_ratio"] == 9.0


def section(name: str, content: str) -> str:
    begin, end = markers(name)
    return f"{begin}\n{content}\n{end}\n"


def test_drift(result: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "results.md", tmp_path / "result.json"
    file.write_text(json.dumps(result))
    page.write_text(f"before\n{section('llava-tiny', 'old')}after\n")
    assert f"llava table {file} --update {page}" in drift(page, file)
    assert main(["table", str(file), "--update", str(page)]) == 0
    assert drift(page, file) is None
    text = page.read_text()
    begin, end = markers("llava-tiny")
    assert text.startswith(f"before\n{begin}\n4 questions") and text.endswith(f"{end}\nafter\n")
    assert "commit 0123456789 (with local changes)" in text

    capsys.readouterr()
    assert main(["table", str(file)]) == 0
    assert capsys.readouterr().out in text

    page.write_text(text.replace("50.0 ± 28.9", "51.0 ± 28.9", 1))
    assert drift(page, file) is not None
    for broken, reason in (
        ((file, file), "no section"),
        ((page, tmp_path / "missing.json"), "cannot read"),
        ((tmp_path / "missing.md", file), "cannot read"),
    ):
        with pytest.raises(UserInputError, match=reason):
            drift(*broken)


def test_one_command_updates_several_files(result: dict, tmp_path: Path) -> None:
    """A file may have the short section, the full one, or both; the old spelling works too."""
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    pages = [tmp_path / name for name in ("short.md", "both.md")]
    short, full = section("llava-tiny-short", ""), section("llava-tiny", "")
    for page, content in zip(pages, (short, short + full), strict=True):
        page.write_text(content)
        assert drift(page, file) is not None
    assert (
        main(["table", "--update-readme", str(pages[0]), str(file), "--update", str(pages[1])]) == 0
    )
    assert [drift(page, file) for page in pages] == [None, None]
    lines = pages[0].read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "none (unpruned)",
        "zoo",
        "pool",
    ], "methods of the README in the order of the run, without controls"
    assert lines[1:-1] == short_section(result).splitlines()
    assert short_section(result) in pages[1].read_text()
    assert full_section(result) in pages[1].read_text()


def test_unusable_result_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
