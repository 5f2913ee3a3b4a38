"""Rows of tables run as written: their budgets and options, however a run is launched."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.__main__ import main
from llava.eval.commands import run as run_command
from llava.eval.commands.paper_table import rows_to_draw
from llava.eval.commands.run import arms_from
from llava.eval.engine.request import RunRequest, arm_word, parse_arm, split_word
from llava.eval.report.paper_table import budget_text, to_csv
from llava.eval.tables import launch, load_table
from llava.eval.tables.fill import Filled, RunResult, fill
from llava.eval.tables.launch import Launch
from llava.eval.tables.plan import arm_for, arm_name, plan, published_budget, unavailable
from llava.eval.tables.spec import Row, Table, TableError, list_tables
from llava.eval.tasks.base import get_benchmark
from llava.families.spec import ModelSpec
from llava.pruning import PruningConfig
from llava.storage import dump_json

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
title = "tiny"
model = "m"
family = "llava-1.5"
tokens = 576
columns = [{ key = "pope", title = "POPE", task = "pope", metric = "mean_f1" }]
"""
# What a row of a table says, the arm that it is, and the setting that this arm runs with.
ROWS = [
    ("keep_ratio = 1", "zoo@1.0", {"keep_ratio": 1.0}),
    ("keep_ratio = 0.999", "zoo@0.999", {"keep_ratio": 0.999}),
    ("keep_ratio = 1e-3", "zoo@0.001", {"keep_ratio": 0.001}),
    ("keep_tokens = 1", "zoo@1", {"keep_tokens": 1}),
    ("keep_tokens = 64", "zoo@64", {"keep_tokens": 64}),
    (
        "keep_tokens = 64\nmethod = 'cen-prune'\n"
        "options = { host = 'zoo', host_options = { directions = 8, step = 0.1 } }",
        'cen-prune:host=zoo,host_options={"directions": 8, "step": 0.1}@64',
        {"keep_tokens": 64, "host": "zoo", "host_options": {"directions": 8, "step": 0.1}},
    ),
    (
        "keep_ratio = 1\nmethod = 'cen-prune'\noptions.host = 'norm'\noptions.host_options = {}",
        "cen-prune:host=norm,host_options={}@1.0",
        {"keep_ratio": 1.0, "host": "norm", "host_options": {}},
    ),
    (
        "keep_tokens = 9\noptions = { directions = 8, fusion = 'sum', allocation = 'global' }",
        "zoo:directions=8,fusion=sum,allocation=global@9",
        {"keep_tokens": 9, "directions": 8, "fusion": "sum", "allocation": "global"},
    ),
]


def write_table(path: Path, rows: list[str]) -> Path:
    """A table of an unpruned row and `rows`, of `zoo` unless they name another method."""
    parts = [HEAD, '[[rows]]\nmethod = "none"\nlabel = "none"']
    for number, row in enumerate(rows):
        method = "" if "method" in row else 'method = "zoo"\n'
        parts.append(f'[[rows]]\nlabel = "row {number}"\n{method}{row}')
    path.write_text("\n".join(parts), "utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return load_table(write_table(tmp_path / "tiny.toml", [row for row, _, _ in ROWS]))


def configs(words: list[str]) -> dict[str, PruningConfig | None]:
    """What `python -m llava.eval` reads of a command's words: arms, and how each prunes."""
    parser = argparse.ArgumentParser()
    run_command.add_command(parser.add_subparsers())
    return {arm.name: arm.seeded(0) for arm in arms_from(parser.parse_args(words))}


def expected() -> dict[str, PruningConfig | None]:
    found: dict[str, PruningConfig | None] = {"none": None}
    for _, word, setting in ROWS:
        options = ({"seed": 0} if word.startswith("zoo") else {}) | setting
        found[word] = PruningConfig.of(word.split(":")[0].split("@")[0], **options)
    return found


def test_rows_become_the_arms_that_they_name(table: Table) -> None:
    assert [arm_for(row).name for row in table.rows] == ["none", *(w for _, w, _ in ROWS)]
    budgets = [row.budget for row in table.rows[1:]]
    assert [(type(b), b) for b in budgets[:4]] == [
        (float, 1.0),
        (float, 0.999),
        (float, 0.001),
        (int, 1),
    ]
    assert [budget_text(b) for b in budgets[:4]] == ["100 %", "99.9 %", "0.1 %", "1"]


def test_a_run_gets_every_row_as_written(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and under torchrun."""
    order = Launch(ModelSpec("m"), tmp_path, tmp_path)
    (job,) = plan(table)
    assert configs(launch.arguments(order.request(job))[1:]) == expected()
    asked: list[RunRequest] = []
    monkeypatch.setattr(launch, "run", lambda request, load: asked.append(request) or 0)
    monkeypatch.setattr("llava.families.spec.local_checkpoint", Path)
    assert launch.run_job(order, job) == 0
    assert {arm.name: arm.seeded(0) for arm in asked[0].arms} == expected()
    calls: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(launch.subprocess, "run", run)
    assert launch.run_job(replace(order, processes=2), job) == 0
    assert configs(calls[0][calls[0].index("llava.eval") + 1 :]) == expected()


def test_a_printed_run_can_be_typed(table: Table, tmp_path: Path, capsys: Any) -> None:
    del table
    assert main(["paper-table", str(tmp_path / "tiny.toml"), "--dry-run"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("python -m")]
    assert configs(shlex.split(line)[3:]) == expected()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@hypothesis.settings(deadline=None)
@given(
    options=st.dictionaries(st.sampled_from(["host", "host_options", "a_b"]), VALUES, max_size=3),
    budget=st.integers(1, 999) | st.floats(0, 1, exclude_min=True),
)
def test_a_word_says_all_of_a_setting(options: dict[str, Any], budget: int | float) -> None:
    found = split_word(arm_word("zoo", budget, options))
    assert json.dumps(found) == json.dumps(["zoo", budget, options])


@pytest.mark.parametrize("value", ["32", "true", "None", "a,b", "a@b", 'a"b', "a=b", " x", "{", ""])
def test_texts_that_look_like_something_else(value: str) -> None:
    for budget in (None, 64, 1.0):
        found = split_word(arm_word("zoo", budget, {"fusion": value}))
        assert found == ("zoo", budget, {"fusion": value})
        assert type(found[1]) is type(budget)


@pytest.mark.parametrize("name", list_tables())
def test_arm_names_of_published_tables_are_plain(name: str) -> None:
    for row in load_table(name).rows:
        options = ",".join(f"{key}={value}" for key, value in row.options.items())
        plain = f"{row.method}{':' if options else ''}{options}@{row.budget}"
        assert arm_name(row) == ("none" if row.method == "none" else plain)


def test_flags_name_a_mapping_as_an_arm_does() -> None:
    words = ["run", "--model-path", "m", "--task", "pope", "--pruner", "cen-prune"]
    words += ["--pruner-option", "host=zoo", "--pruner-option", 'host_options={"directions": 8}']
    (name,) = configs([*words, "--keep-ratio", "1"])
    assert name == 'cen-prune:host=zoo,host_options={"directions": 8}@1.0'
    assert configs([*words, "--keep-ratio", "1"]) == configs([*words[:5], "--arm", name])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("keep_tokens = 64.0", r"row 0: keep_tokens must be a whole number .* 64\.0"),
        ("keep_tokens = true", "row 0: keep_tokens must be a whole number .* True"),
        ("keep_tokens = 0", "row 0: keep_tokens must be"),
        ("keep_ratio = true", r"row 0: keep_ratio must be a share in \(0, 1\], got True"),
        ("keep_ratio = 0", "row 0: keep_ratio must be a share"),
        ("keep_ratio = 2", "row 0: keep_ratio must be a share"),
        ("keep_ratio = nan", "row 0: keep_ratio must be a share"),
        ("keep_ratio = 1\nkeep_tokens = 1", "row 0 needs one budget"),
        ("", "row 0 needs one budget"),
        ("keep_tokens = 2\noptions = 3", "row 0: options must be a table"),
        ("keep_tokens = 2\noptions = { seed = 2026-01-01 }", "row 0: options .* plain values"),
        ("method = 'none'\noptions = { seed = 1 }", "row 0 is not pruned"),
        ("method = 'fastv'\nkeep_ratio = 1.5", "row 0: keep_ratio must be a share"),
    ],
)
def test_budgets_and_options_that_cannot_be(row: str, reason: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "tiny.toml", [row])
    with pytest.raises(TableError, match=reason) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("keep_tokens =", "keep_token =", "row 0: unknown key 'keep_token'; did you mean 'keep_to"),
        ('label = "row 0"', "label = 3", "3: label must be a text but is 3"),
        ('label = "row 0"', "", "a row has no label"),
        ('title = "tiny"', "", "the table has no title"),
        (
            'title = "tiny"',
            'titel = "tiny"',
            "the table: unknown key 'titel'; did you mean 'title'",
        ),
        ('title = "tiny"', 'title = "tiny"\nname = "x"', "the table: unknown key 'name'"),
        (
            "tokens = 576",
            'tokens = "many"',
            "the table: tokens must be a whole number but is 'many'",
        ),
        ("metric =", "metrics =", "a column: unknown key 'metrics'; did you mean 'metric'"),
        ("columns = [", "columns = [] # ", "it needs columns and rows"),
        ("columns = [", "columns = [3] # ", "a column must be a TOML table but is 3"),
        ("columns = [", "columns = 3 # ", "columns must be a list"),
        ("columns = [", "average = { gap = 1 }\ncolumns = [", "unknown key 'average_gap'"),
        ("[sources.p]", "[[sources]]", "sources must be a TOML table"),
        ("[sources.p]", "[sources.p]\nyear = 1", "source p: unknown key 'year'"),
        (
            'kind = "paper"',
            'kind = "papre"',
            "source p: unknown kind 'papre'; did you mean 'paper'",
        ),
        ("published.p", "published.q", "row 0: unknown source 'q'; valid: p, r"),
        ("pope = 1.5", "pop = 1.5", "row 0: unknown column 'pop'; did you mean 'pope'"),
        ("pope = 1.5", "pope = 'x'", "row 0: pope must be a number but is 'x'"),
        ("published.p = {", "published.r = { pope = 1 }\npublished.p = {", "two published figures"),
        ("published.p = { pope = 1.5 }", "published = 3", "published must be a TOML table"),
        ("published.p = { pope = 1.5 }", "published.p = 3", "p must be a TOML table"),
    ],
)
def test_what_a_table_cannot_say_is_one_clear_error(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "tiny.toml", ["keep_tokens = 2\npublished.p = { pope = 1.5 }"])
    text = path.read_text("utf-8")
    text += '\n[sources.p]\nkind = "paper"\ntext = "T"\n[sources.r]\nkind = "re-run"\ntext = "R"\n'
    path.write_text(text, "utf-8")
    assert load_table(path).rows[1].published["pope"].value == 1.5
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(TableError) as caught:
        load_table(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("options = { nope = 1 }", "unknown option of 'zoo': 'nope'"),
        ("options = { directions = [1] }", "directions must be a whole number"),
        ("options = { step = nan }", "step must be a positive number"),
        ("method = 'cen-prune'\noptions.host = 'fastv'", "fastv"),
        (
            "method = 'cen-prune'\noptions = { host = 'zoo', host_options = { nope = 1 } }",
            "unknown option of 'zoo': 'nope'",
        ),
    ],
)
def test_rows_that_no_method_can_run_are_refused_before_anything_runs(
    row: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "tiny.toml", ["keep_tokens = 1", f"keep_tokens = 2\n{row}"])
    for flags in (["--dry-run"], ["--demo", "--output", str(tmp_path / "out")]):
        assert main(["paper-table", str(path), *flags]) == 2
        said = capsys.readouterr()
        assert "the row 'row 1' of tiny cannot run: " in said.err and reason in said.err
        assert said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "out").exists()


def test_one_token_and_all_of_them_differ_in_every_file() -> None:
    one, whole = parse_arm("zoo@1"), parse_arm("zoo@1.0")
    integer = replace(whole, pruning=PruningConfig("zoo", keep_ratio=1))
    texts = [dump_json(arm.to_dict()) for arm in (one, whole, integer)]
    assert '"keep_tokens": 1\n' in texts[0] and "keep_ratio" not in texts[0]
    assert '"keep_ratio": 1.0\n' in texts[1] and texts[1] == texts[2]
    assert (one.label, whole.label) == ("zoo, 1 tokens", "zoo, 100 % of the tokens")


def filled(table: Table) -> Filled:
    """The table with a figure for every arm: its place in the run."""
    (job,) = plan(table)
    arms = {
        arm.name: {
            "metrics": {"mean_f1": {"value": 50.0 + place, "se": None, "n": 4}},
            "tokens_mean": None,
        }
        for place, arm in enumerate(job.arms)
    }
    return fill(table, {job.place: RunResult(arms, [])}, published_budget)


def test_every_row_finds_its_own_figure(table: Table) -> None:
    found = filled(table)
    values = [row.cells["pope"].measured.value for row in found.rows]  # type: ignore[union-attr]
    assert values == [50.0 + place for place in range(len(ROWS) + 1)]
    cells = list(csv.DictReader(io.StringIO(to_csv(found))))
    pope = [cell for cell in cells if cell["column"] == "pope"]
    assert [cell["budget"] for cell in pope][:5] == ["", "1.0", "0.999", "0.001", "1"]
    assert pope[6]["options"] == 'host=zoo,host_options={"directions": 8, "step": 0.1}'


def test_equal_options_in_another_order_find_their_figure(tmp_path: Path) -> None:
    rows = [
        f"keep_tokens = 9\noptions = {{ {options} }}"
        for options in ("directions = 8, fusion = 'sum'", "fusion = 'sum', directions = 8")
    ]
    found = filled(load_table(write_table(tmp_path / "tiny.toml", rows)))
    assert all(row.cells["pope"].measured is not None for row in found.rows)


def test_a_share_is_not_held_against_a_number_of_tokens(table: Table) -> None:
    figure = next(row for row in load_table("table1_llava_v1_5_7b").rows if row.published)
    published = {"pope": next(iter(figure.published.values()))}
    ours = [Row("zoo-exact", "ours", against="zoo", **b) for b in BUDGETS_OF_ONE]
    theirs = Row("zoo", "theirs", keep_tokens=1, published=published)
    found = filled(replace(table, rows=(table.rows[0], theirs, *ours)))
    assert [row.cells["pope"].borrowed for row in found.rows] == [False, False, True, False]


BUDGETS_OF_ONE: list[dict[str, Any]] = [{"keep_tokens": 1}, {"keep_ratio": 1}]


def test_pictures_show_the_smallest_of_each_kind(table: Table) -> None:
    drawn = [(row.row.method, row.budget) for row in rows_to_draw(filled(table))]
    assert drawn == [("zoo", 0.001), ("zoo", 1)]


def test_such_rows_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(
        tmp_path / "tiny.toml",
        [
            "keep_ratio = 1",
            "keep_tokens = 1",
            "keep_tokens = 1\nmethod = 'cen-prune'\n"
            "options = { host = 'zoo', host_options = { directions = 8, step = 0.1 } }",
        ],
    )
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    words = ["paper-table", str(path), "--demo", "--demo-samples", "6", "--device", "cpu"]
    assert main([*words, "--output", str(out)]) == 0
    report = json.loads((out / "tiny.json").read_text("utf-8"))
    assert [row["tokens"] for row in report["rows"]] == [576.0, 576.0, 1.0, 1.0]
    assert [row["budget"] for row in report["rows"]] == [None, 1.0, 1, 1]
    cells = [cell for cell in report["cells"] if cell["column"] == "pope"]
    assert all(cell["ours"] for cell in cells)
    assert cells[0]["ours"] == cells[1]["ours"], "all tokens are the unpruned model"
    run = out / "cells" / "pope"
    arms = json.loads((run / "metrics.json").read_text("utf-8"))["arms"]
    name = 'cen-prune:host=zoo,host_options={"directions": 8, "step": 0.1}@1'
    assert list(arms) == ["none", "zoo@1.0", "zoo@1", name]
    assert arms[name]["pruning"]["options"]["host_options"] == {"directions": 8, "step": 0.1}
    assert (out / "kept_tokens.png").is_file()
    capsys.readouterr()
    assert main(["compare", f"{run}:{name}", f"{run}:zoo@1.0"]) == 0
    assert f"A: {name} ({run})" in capsys.readouterr().out


def test_a_benchmark_that_comes_with_the_package_needs_no_data_root(tmp_path: Path) -> None:
    path = write_table(tmp_path / "tiny.toml", ["keep_tokens = 2"])
    path.write_text(path.read_text().replace('"pope"', '"llava-tiny"'))
    jobs = plan(load_table(path))
    given, default = (Launch(ModelSpec("m"), root, tmp_path) for root in (tmp_path, None))
    assert {default.request(job).benchmark.root for job in jobs} == {
        get_benchmark("llava-tiny").default_root
    }
    assert {given.request(job).benchmark.root for job in jobs} == {tmp_path}


def test_the_table_in_the_documents_is_complete(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tables.md").read_text()
    path = tmp_path / "my.toml"
    path.write_text(re.search(r"^```toml\n(.*?)^```", text, flags=re.M | re.S)[1])
    table = load_table(path)
    assert [unavailable(table, row) for row in table.rows] == [None, None]
    assert [job.task for job in plan(table)] == ["llava-tiny"]
    assert table.rows[1].published["tiny"].source.kind == "paper"


def test_all_missing_keys_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "tiny.toml", ["keep_tokens = 2"])
    path.write_text(path.read_text().replace('model = "m"', "").replace('title = "tiny"', ""))
    with pytest.raises(TableError, match="the table has no title, model"):
        load_table(path)
