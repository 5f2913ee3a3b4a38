"""Tables of papers: data files, the runs they need, their cells, every form they are printed in."""

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_llava import exit_code

from llava.eval.__main__ import main
from llava.eval.commands import paper_table as command
from llava.eval.commands.paper_table import cut_table
from llava.eval.engine.request import arm_of, parse_arm
from llava.eval.report.paper_table import records, to_csv, to_html, to_json, to_latex, to_markdown
from llava.eval.report.plots import Point, pareto_front, points_of
from llava.eval.tables import load_table
from llava.eval.tables.fill import Filled, RunResult, fill, read_run
from llava.eval.tables.launch import Launch, SharedModel
from llava.eval.tables.plan import (
    Job,
    arm_for,
    arm_name,
    plan,
    printed_budget,
    published_budget,
    scaled_budgets,
    unavailable,
)
from llava.eval.tables.spec import KINDS, TableError, list_tables
from llava.families.spec import ModelSpec
from llava.pruning import PruningConfig, list_methods
from llava.pruning.decoder.registry import list_decoder_methods

MAIN = "table1_llava_v1_5_7b"

# A second reading of the published tables: (table, method, budget, option or protocol) -> figures.
SPOT_CHECKS = [
    (MAIN, "none", None, {}, {"gqa": 61.9, "mme": 1511, "seed": 66.2, "mmmu": 36.3}),
    (MAIN, "zoo", 64, {}, {"pope": 85.7, "mme": 1375, "textvqa": 55.6, "average": 95.20}),
    (MAIN, "zoo", 128, {}, {"gqa": 59.5, "mmbench": 62.1, "seed": 63.0, "average": 97.62}),
    (MAIN, "zoo", 192, {}, {"average": 98.27}),
    (MAIN, "divprune", 64, {}, {"gqa": 57.8, "vqav2": 74.1, "mmmu": 35.7, "average": 94.42}),
    (MAIN, "divprune", 192, {}, {"gqa": 60.0, "pope": 87.0, "average": 97.78}),
    (MAIN, "visionzip", 64, {}, {"pope": 77.1, "mme": 1370, "average": 92.74}),
    (MAIN, "fastv", 64, {}, {"pope": 48.0, "scienceqa": 51.1, "average": 71.10}),
    (MAIN, "sparsevlm", 192, {}, {"gqa": 57.6, "pope": 83.6}),
    (MAIN, "pyramiddrop", 128, {}, {"mme": 1422, "mmbench": 62.1}),
    (MAIN, "mmtok", 192, {}, {"gqa": 60.1, "mmbench": 63.4}),
    (MAIN, "cdpruner", 64, {}, {"pope": 87.0, "seed": 62.6}),
    (MAIN, "cen-prune", 64, {"host": "zoo"}, {"gqa": 58.2, "mme": 1390}),
    ("llava_v1_5_13b", "zoo", 64, {}, {"gqa": 58.8, "mmmu": 36.2, "average": 96.5}),
    ("llava_v1_5_13b", "divprune", 128, {}, {"mme": 1446, "textvqa": 58.0}),
    ("llava_next_7b", "none", None, {}, {"gqa": 64.2, "textvqa": 61.3, "seed": 69.6}),
    ("llava_next_7b", "zoo", 160, {"next": "native"}, {"pope": 81.7, "mmmu": 36.2}),
    ("llava_next_7b", "zoo", 160, {"next": "zoo-release"}, {"average": 95.4}),
    ("llava_next_7b", "divprune", 160, {}, {"pope": 79.4, "average": 92.4}),
    ("llava_next_7b", "visionzip", 160, {}, {"gqa": 55.5, "average": 90.4}),
    ("qwen2_5_vl_7b", "none", None, {}, {"mme": 2322, "textvqa": 77.5}),
    ("qwen2_5_vl_7b", "zoo", 0.1, {}, {"average": 90.8}),
    ("qwen2_5_vl_7b", "divprune", 0.2, {}, {"gqa": 58.5, "average": 96.0}),
    ("ablation_fusion", "zoo", 640, {"fusion": "sum"}, {"average": 98.1}),
    ("ablation_fusion", "zoo", 160, {"fusion": "sensitivity"}, {"average": 91.2}),
    ("efficiency_llava_v1_5_7b", "zoo", 64, {}, {"ttft": 112.08, "total": 154.51}),
    ("efficiency_llava_v1_5_7b", "divprune", 32, {}, {"ttft": 69.38, "total": 111.22}),
    ("efficiency_llava_next_7b", "zoo", 160, {}, {"ttft_x": 2.59, "total_x": 2.30}),
]


CONDITIONS = {
    "command": "python -m llava.eval paper-table <x>",
    "model": "m",
    "data_root": "d",
    "git": None,
    "versions": {"torch": "2"},
    "machine": {"device": "cpu"},
}


def fake_metrics(job: Job) -> dict:
    """What a run would write: scores that differ by task and arm, on the tasks' own scales."""
    arms = {}
    for place, arm in enumerate(job.arms):
        values = {"accuracy": 60.0, "mean_f1": 80.0, "perception": 1500.0, "image_accuracy": 70.0}
        arms[arm.name] = arm.to_dict() | {
            "metrics": {
                key: {"value": value * (1 - place / 100), "se": 1.25, "n": 40, "scale": 100.0}
                for key, value in values.items()
            },
            "tokens_mean": 576.0 if arm.budget is None else float(arm.budget),
            "failed_images": 0,
        }
    return {"schema_version": 2, "task": job.task, "protocol": job.protocol, "arms": arms}


def fake_timings(job: Job) -> list[dict]:
    lines = []
    for batch in range(3):
        for place, arm in enumerate(job.arms):
            scale = 1000.0 if batch == 0 else 1.0  # the first batch of a process is slow
            lines.append(
                {
                    "batch": batch,
                    "arm": arm.name,
                    "cold": batch == 0,
                    "encode_ms": 10.0 * scale,
                    "prune_ms": None if arm.method == "none" else 2.0,
                    "splice_ms": 1.0,
                    "prefill_ms": 89.0 / (place + 1),
                    "decode_ms": 5.0,
                    "new_tokens": 2,
                }
            )
    return lines


def write_fake_run(launch: Launch, job: Job) -> int:
    """Stands in for the run command."""
    folder = launch.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(fake_metrics(job)))
    lines = "".join(json.dumps(line) + "\n" for line in fake_timings(job))
    (folder / "timings.jsonl").write_text(lines)
    return 0


def filled(name: str = MAIN, **kwargs: object) -> Filled:
    table = load_table(name)
    results = {
        job.place: RunResult(fake_metrics(job)["arms"], fake_timings(job)) for job in plan(table)
    }
    return fill(table, results, published_budget, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "method", "budget", "which", "figures"), SPOT_CHECKS)
def test_published_figures_are_those_of_the_papers(
    name: str, method: str, budget: float | None, which: dict, figures: dict
) -> None:
    rows = [
        row
        for row in load_table(name).rows
        if row.method == method
        and row.budget == budget
        and which.get("next", row.next_protocol) == row.next_protocol
        and all(row.options.get(key) == value for key, value in which.items() if key != "next")
        and row.published
    ]
    assert len(rows) == 1
    assert {key: rows[0].published[key].value for key in figures} == figures


@pytest.mark.parametrize("name", list_tables())
def test_every_table_is_sound(name: str) -> None:
    table = load_table(name)
    assert {source.kind for source in table.sources()} <= set(KINDS)
    keys = [(row.method, row.budget, str(row.options), row.next_protocol) for row in table.rows]
    assert len(set(keys)) == len(keys)
    for row in table.rows:
        if row.method in list_methods() and row.method != "none":
            budget = {"keep_ratio" if row.keep_ratio else "keep_tokens": row.budget}
            PruningConfig(row.method, **budget, options=row.options)
    if any(column.metric.startswith("total") and column.timed for column in table.columns):
        assert table.batch_size == 1


def test_table_1_pins_prompt_and_metric_of_every_column() -> None:
    columns = {c.key: (c.task, c.protocol, c.metric) for c in load_table(MAIN).columns}
    assert columns["textvqa"] == ("textvqa", "ocr", "accuracy")
    assert columns["mme"] == ("mme", None, "perception")
    assert columns["seed"] == ("seed", "image", "image_accuracy")
    assert columns["pope"] == ("pope", None, "mean_f1")
    assert columns["mmbench"] == ("mmbench", "single", "accuracy")
    assert columns["vqav2"] == ("vqav2", "val", "accuracy")
    assert [c.key for c in load_table(MAIN).columns if c.no_gap] == ["vqav2"]


def test_metrics_that_were_counted_otherwise_are_left_out() -> None:
    """At 192 tokens MME is published in total and SEED with videos: no figures for our columns."""
    rows = [row for row in load_table(MAIN).rows if row.keep_tokens == 192]
    assert not any({"mme", "seed"} & set(row.published) for row in rows)


def test_an_unknown_table_or_a_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=MAIN):
        load_table("table1_llava_v1_5")
    path = tmp_path / "mine.toml"
    path.write_text('title = "x"\nmodel = "m"\nfamily = "llava-1.5"\ncolumns = []\nrows = [1]')
    with pytest.raises(TableError, match="does not describe a table"):
        load_table(path)
    path.write_text("title = ")
    with pytest.raises(TableError, match="not TOML"):
        load_table(path)
    with pytest.raises(TableError, match="cannot read"):
        load_table(tmp_path / "absent.toml")


def test_a_run_answers_one_task_under_every_arm() -> None:
    jobs = plan(load_table(MAIN))
    assert [job.task for job in jobs] == [c.task for c in load_table(MAIN).columns]
    words = [arm.name for arm in jobs[0].arms]
    assert words[0] == "none" and len(set(words)) == len(words)
    assert "cen-prune:host=zoo@64" in words and "zoo-exact@192" in words
    assert {"fastv@64", "pyramiddrop:recipe=mean128@128", "pyramiddrop@192"} < set(words)


def test_protocols_of_tiled_images_go_to_runs_of_their_own() -> None:
    jobs = [job for job in plan(load_table("llava_next_7b")) if job.task == "pope"]
    assert [job.next_protocol for job in jobs] == ["native", "fixed2880", "zoo-release", "spatial"]
    assert all(job.arms[0] == arm_of(None) for job in jobs)
    assert len({job.folder for job in plan(load_table("llava_next_7b"))}) == 36


def test_rows_without_method_or_model_are_named() -> None:
    table = load_table(MAIN)
    lacking = {unavailable(table, row) for row in table.rows}
    methods = {*list_methods(), *list_decoder_methods()}
    registered = {row.method for row in table.rows} & methods
    assert {"fastv", "pyramiddrop"} < registered
    assert lacking == {None} | ({row.method for row in table.rows} - registered)
    qwen = load_table("qwen2_5_vl_7b")
    assert {unavailable(qwen, row) for row in qwen.rows} == {None}
    assert [arm.name for arm in plan(qwen)[0].arms][:3] == ["none", "random@0.2", "visionzip@0.2"]
    other = replace(qwen, family="toy_vl")
    assert {unavailable(other, row) for row in other.rows} == {"toy_vl"}
    assert plan(other) == []


@pytest.mark.parametrize("name", list_tables())
def test_every_row_makes_an_arm(name: str) -> None:
    """Methods between layers reach their budgets in the table's own models of 32 and 40 layers."""
    table = load_table(name)
    for row in table.rows:
        if unavailable(table, row) is not None:
            assert row.method not in list_methods(), row
            continue
        arm = arm_for(row)
        assert parse_arm(arm.name).pruning == arm.pruning
        if arm.decoder is None:
            continue
        tokens = table.tokens or 576
        for depth in (32, 40):
            mean = arm.decoder.plan(tokens, tokens, depth).mean(tokens, depth)
            named = row.method == "sparsevlm"  # its names count other layers
            assert mean == pytest.approx(printed_budget(row), rel=0.35 if named else 0.05)


def test_settings_of_the_rows_between_layers() -> None:
    """PyramidDrop has other layers for every budget; SparseVLM runs its released schedules."""
    rows = {(row.method, row.budget): row for row in load_table(MAIN).rows}
    assert arm_name(rows["pyramiddrop", 192]) == "pyramiddrop@192"
    assert arm_name(rows["pyramiddrop", 128]) == "pyramiddrop:recipe=mean128@128"
    assert arm_name(rows["pyramiddrop", 64]) == "pyramiddrop:recipe=early@64"
    assert arm_name(rows["sparsevlm", 64]) == "sparsevlm:schedule=official@64"
    layers = {192: (8, 16, 24), 128: (2, 10, 20), 64: (2, 8, 16)}
    for budget, cuts in layers.items():
        decoder = arm_for(rows["pyramiddrop", budget]).decoder
        assert decoder is not None and decoder.plan(576, 576, 32).layers == cuts


FASTV = 'method = "fastv", keep_tokens = 128, options = { k = 3 }'
WITHIN = f"""
title = "Within"
model = "m"
family = "llava-1.5"
tokens = 1152
columns = [{{ key = "pope", title = "POPE", task = "pope", metric = "mean_f1" }}]
rows = [
  {{ method = "none", label = "all" }},
  {{ method = "zoo", label = "ZOO", keep_tokens = 384 }},
  {{ method = "zoo", label = "both", keep_tokens = 384, decoder = {{ {FASTV} }} }},
  {{ method = "none", label = "alone", decoder = {{ method = "fastv", keep_ratio = 0.25 }} }},
  {{ method = "none", label = "unknown", decoder = {{ method = "nobody", keep_tokens = 128 }} }},
]
"""


def test_a_row_may_prune_before_and_within(tmp_path: Path) -> None:
    path = tmp_path / "within.toml"
    path.write_text(WITHIN)
    table = load_table(path)
    budgets = scaled_budgets(table, 576)
    assert [row.methods for row in table.rows] == [
        "none",
        "zoo",
        "zoo+fastv",
        "fastv",
        "nobody",
    ]
    assert [unavailable(table, row) for row in table.rows] == [None] * 4 + ["nobody"]
    assert [printed_budget(row) for row in table.rows] == [None, 384, 128, 0.25, 128]
    (job,) = plan(table, budgets)
    names = ["none", "zoo@192", "zoo@192+fastv:k=3@64", "fastv@0.25"]
    assert [arm.name for arm in job.arms] == names
    assert all(parse_arm(arm.name).pruning == arm.pruning for arm in job.arms)
    arms = fake_metrics(job)["arms"]
    within = {"tokens_in": 192.0, "tokens_last": 20.0, "tokens_mean": 63.8, "tokens_per_layer": []}
    arms[names[2]] |= {"tokens_in": 192.0, "tokens_mean": 63.8, "between_layers": within}
    arms[names[3]] |= {"metrics": {}, "tokens_mean": None, "unavailable": "too low", "floor": 144}
    found = fill(table, {job.place: RunResult(arms, [])}, budgets)
    assert [row.budget for row in found.rows] == [None, 192, 64, 0.25, 64]
    assert [row.tokens for row in found.rows] == [576.0, 192.0, 63.8, None, None]
    assert len(found.covered) == 1, "a budget that cannot be reached spoils no average"
    lines = {
        line.split("|")[1].strip(): line for line in to_markdown(found).splitlines() if "|" in line
    }
    assert "| floor 144 |" in " ".join(lines["alone"].replace("/", "|").split())
    assert "not available: nobody" in "".join(lines)
    shown = {record["label"]: (record["method"], record["options"]) for record in records(found)}
    assert shown["both"] == ("zoo+fastv", "+k=3") and shown["alone"] == ("fastv", "")
    assert "n/a: alone at 25 %: too low." in to_markdown(found)
    cells = {row["label"]: row for row in csv.DictReader(io.StringIO(to_csv(found)))}
    names_of = [
        (cells[label]["arm"], cells[label]["decoder"]) for label in ("ZOO", "both", "alone")
    ]
    assert names_of == list(zip(names[1:], ("", "fastv", "fastv"), strict=True))
    floors = [row["floor"] for row in csv.DictReader(io.StringIO(to_csv(found)))]
    assert floors.count("144") == len(table.columns) and {*floors} == {"", "144"}
    for cut, kept in (("zoo+fastv", ["all", "both"]), ("zoo", ["all", "ZOO"])):
        assert [row.label for row in cut_table(table, None, [cut]).rows] == kept


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("keep_ratio = 0.25", "keep_ratio = 2", "alone: decoder: keep_ratio must be a share"),
        (", keep_ratio = 0.25", "", "alone: decoder needs one budget"),
        ("keep_ratio = 0.25", "keep = 2", "alone: decoder: unknown key 'keep'"),
        ('{ method = "fastv", keep_ratio = 0.25 }', "3", "alone: decoder must be a TOML table"),
        ("options = { k = 3 }", "options = 3", "both: decoder: options must be a table"),
    ],
)
def test_what_a_row_cannot_drop_within(old: str, new: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "within.toml"
    assert old in WITHIN
    path.write_text(WITHIN.replace(old, new))
    with pytest.raises(TableError, match=reason):
        load_table(path)


def test_budgets_of_a_demo_are_the_same_share_of_its_tokens() -> None:
    table = load_table("llava_next_7b")
    scaled = scaled_budgets(table, 576)
    found = {row.keep_tokens: scaled(row) for row in table.rows if row.keep_tokens}
    assert found == {640: 128, 320: 64, 160: 32}
    assert scaled(table.rows[0]) is None


def test_cells_hold_gap_error_and_count() -> None:
    table = filled()
    row = next(r for r in table.rows if (r.row.method, r.budget) == ("zoo", 64))
    cell = row.cells["pope"]
    assert cell.measured is not None and cell.published is not None
    assert cell.gap == pytest.approx(cell.measured.value - 85.7)
    assert (cell.measured.se, cell.measured.n) == (1.25, 40)
    assert row.cells["vqav2"].gap is None and row.cells["vqav2"].published.value == 74.9


def test_retention_is_the_mean_of_ratios_to_the_unpruned_model() -> None:
    table = filled()
    row = next(r for r in table.rows if (r.row.method, r.budget) == ("zoo", 64))
    arms = [arm.name for arm in plan(load_table(MAIN))[0].arms]
    assert row.average.measured.value == pytest.approx(100 - arms.index("zoo@64"))
    assert row.average.gap == pytest.approx(row.average.measured.value - 95.20)
    assert table.rows[0].average.measured.value == pytest.approx(100)
    assert len(table.covered) == 9


def test_an_average_over_fewer_tasks_has_no_gap() -> None:
    table = load_table(MAIN)
    jobs = [job for job in plan(table) if job.task != "mmmu"]
    results = {job.place: RunResult(fake_metrics(job)["arms"], []) for job in jobs}
    found = fill(table, results, published_budget)
    assert len(found.covered) == 8 and "MMMU" not in found.covered
    assert all(row.average.gap is None for row in found.rows)
    assert "Not in the average" in to_markdown(found)


def test_a_budget_that_a_method_refuses_is_named_and_spoils_no_average() -> None:
    table = load_table(MAIN)
    results = {}
    for job in plan(table):
        arms = fake_metrics(job)["arms"]
        arms["pool@64"] |= {"metrics": {}, "tokens_mean": None, "unavailable": "no such grid"}
        results[job.place] = RunResult(arms, [])
    found = fill(table, results, published_budget)
    row = next(r for r in found.rows if (r.row.method, r.budget) == ("pool", 64))
    assert row.refusal == "no such grid" and row.average.measured is None
    assert len(found.covered) == 9
    assert "n/a: average pooling at 64: no such grid." in to_markdown(found)


def test_a_task_that_the_unpruned_model_fails_is_not_divided_by() -> None:
    table = load_table("ablation_step")
    (job,) = plan(table)
    arms = fake_metrics(job)["arms"]
    arms["none"]["metrics"]["mean_f1"]["value"] = 0.0
    found = fill(table, {job.place: RunResult(arms, [])}, published_budget)
    assert found.covered == () and all(row.average.measured is None for row in found.rows)


def test_our_row_is_held_against_the_method_it_computes() -> None:
    table = filled()
    row = next(r for r in table.rows if (r.row.method, r.budget) == ("zoo-exact", 64))
    assert row.cells["pope"].borrowed and row.cells["pope"].published.value == 85.7
    assert not table.rows[0].cells["pope"].borrowed
    assert "85.7¹†" in to_markdown(table)


def test_missing_cells_print_na_and_absent_methods_say_so() -> None:
    lines = to_markdown(filled()).splitlines()
    fastv = next(line for line in lines if "FastV" in line and "| 64" in " ".join(line.split()))
    assert "not available" not in fastv and "52.7" in fastv
    mme = next(line for line in lines if line.startswith("| ZOO-Prune ") and " 192 " in line)
    assert "n/a / " in mme


def test_a_demo_has_counts_and_no_gaps() -> None:
    table = filled(demo=True)
    assert all(record["gap"] is None for record in records(table))
    text = to_markdown(table)
    assert "DEMO" in text and "POPE (n=40)" in text and "gap" not in text
    assert "DEMO" in to_latex(table)


def test_times_leave_out_the_first_batch_and_are_paired() -> None:
    table = filled("efficiency_llava_v1_5_7b")
    base, row = table.rows[0], table.rows[1]
    assert base.cells["ttft"].measured.value == pytest.approx(100.0)
    assert base.cells["total"].measured.value == pytest.approx(110.0)
    assert base.cells["ttft_x"].measured.value == pytest.approx(1.0)
    own = 10 + 2 + 1 + 89 / 2
    assert row.cells["ttft"].measured.value == pytest.approx(own)
    assert row.cells["ttft_x"].measured.value == pytest.approx(100 / own)
    assert base.cells["ttft"].gap is None and base.cells["ttft"].published.value == 154.77


def test_every_cell_is_in_csv_and_json() -> None:
    table = filled()
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(rows) == len(table.rows) * (len(table.table.columns) + 1)
    zoo = next(r for r in rows if (r["method"], r["budget"], r["column"]) == ("zoo", "64", "pope"))
    assert (zoo["published"], zoo["source"], zoo["kind"], zoo["n"]) == (
        "85.7",
        "cen",
        "re-run",
        "40",
    )
    assert float(zoo["gap"]) == pytest.approx(float(zoo["ours"]) - 85.7)
    content = json.loads(to_json(table, {"command": "x"}))
    assert len(content["cells"]) == len(rows)
    assert content["samples"]["pope"] == 40 and len(content["average_covers"]) == 9


def test_a_measured_mean_stands_beside_a_budget_that_it_is_not() -> None:
    table = load_table(MAIN)
    (row,) = [r for r in table.rows if r.method == "sparsevlm" and r.keep_tokens == 192]
    table = replace(table, rows=(table.rows[0], row))
    arm, results = arm_name(row), {}
    for job in plan(table):
        arms = fake_metrics(job)["arms"]
        arms[arm] |= {"tokens_in": 576.0, "tokens_mean": 254.25}
        results[job.place] = RunResult(arms, [])
    found = fill(table, results, published_budget)
    for text in (to_markdown(found), to_latex(found), to_html(found, CONDITIONS, {})):
        assert "192 (measured 254.2)" in text and "measured: visual tokens" in text
    cells = [c for c in csv.DictReader(io.StringIO(to_csv(found))) if c["arm"] == arm]
    assert {(c["budget"], c["tokens_mean"], c["decoder"]) for c in cells} == {
        ("192", "254.25", "sparsevlm")
    }
    assert {record["tokens_mean"] for record in records(found)} == {254.25, 576.0}
    exact = to_markdown(filled())
    assert "(measured" not in exact and "measured:" not in exact


def test_latex_is_a_table_with_its_signs_escaped() -> None:
    text = to_latex(filled())
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in body}) == 1
    assert not re.search(r"[^\\]%", "\n".join(body)) and "±" not in text.split("\\bottomrule")[0]


def test_the_pareto_front_holds_what_nothing_else_beats() -> None:
    points = [Point("a", 1, 1), Point("b", 2, 3), Point("c", 2, 2), Point("d", 3, 3)]
    assert [point.label for point in pareto_front(points)] == ["a", "b"]
    assert pareto_front([]) == []
    assert {p.cost for p in points_of(filled(), "tokens")} == {576.0, 192.0, 128.0, 64.0}


def test_the_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    Image.new("RGB", (2, 2)).save(picture)
    page = to_html(filled(), CONDITIONS, {"kept tokens": picture})
    assert "data:image/png;base64," in page and "&lt;x&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|@import|url\(|<script", page)


@pytest.fixture
def with_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task of the tables counts as registered, and nothing is drawn."""
    names = [c.task for name in list_tables() for c in load_table(name).columns]
    monkeypatch.setattr("llava.eval.tables.plan.list_benchmarks", lambda: names)
    monkeypatch.setattr(command, "draw_overlays", lambda *_: False)


@pytest.fixture
def arguments() -> Callable[..., argparse.Namespace]:
    def parse(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        command.add_command(parser.add_subparsers())
        args = parser.parse_args(["paper-table", *words])
        args.command_line = "python -m llava.eval paper-table"
        return args

    return parse


def test_a_table_is_run_and_written_in_every_form(
    with_tasks: None,
    arguments: Callable[..., argparse.Namespace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    args = arguments(MAIN, "--output", str(tmp_path), "--methods", "zoo", "zoo-exact")
    assert command.run(args, write_fake_run) == 0
    suffixes = {path.suffix for path in tmp_path.glob(f"{MAIN}.*")}
    assert suffixes == {".md", ".csv", ".tex", ".json", ".html"}
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "accuracy_vs_tokens.png",
        "accuracy_vs_latency.png",
    }
    printed = capsys.readouterr().out
    assert (tmp_path / f"{MAIN}.md").read_text() in printed
    assert "divprune" not in printed.lower()


def test_a_failing_run_leaves_its_cells_empty_and_is_reported(
    with_tasks: None,
    arguments: Callable[..., argparse.Namespace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def fail_on_pope(launch: Launch, job: Job) -> int:
        return 2 if job.task == "pope" else write_fake_run(launch, job)

    args = arguments(MAIN, "--output", str(tmp_path), "--tasks", "pope", "gqa", "--methods", "zoo")
    assert command.run(args, fail_on_pope) == 1
    printed = capsys.readouterr().out
    assert "the run of pope ended with exit code 2" in printed
    assert math.isclose(json.loads((tmp_path / f"{MAIN}.json").read_text())["samples"]["gqa"], 40)
    assert not any(row.average.gap for row in filled(MAIN, demo=True).rows)


def test_figures_of_an_earlier_run_do_not_stand_for_one_that_fails(
    with_tasks: None, arguments: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    args = arguments(MAIN, "--output", str(tmp_path), "--tasks", "pope", "--methods", "zoo")
    assert command.run(args, write_fake_run) == 0
    args.model_path = "another/model"
    assert command.run(args, lambda launch, job: 2) == 1
    content = json.loads((tmp_path / f"{MAIN}.json").read_text())
    assert content["conditions"]["model"] == "another/model"
    assert all(cell["ours"] is None for cell in content["cells"])


def test_the_first_questions_of_a_task_have_no_gap(
    with_tasks: None,
    arguments: Callable[..., argparse.Namespace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    args = arguments(MAIN, "--output", str(tmp_path), "--methods", "zoo", "--limit", "40")
    assert command.run(args, write_fake_run) == 0
    content = json.loads((tmp_path / f"{MAIN}.json").read_text())
    assert all(cell["gap"] is None for cell in content["cells"])
    assert any(cell["ours"] and cell["published"] for cell in content["cells"])
    assert "No gaps: only the first 40 questions of a task were asked." in capsys.readouterr().out


def test_runs_of_a_table_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ModelSpec] = []
    monkeypatch.setattr(ModelSpec, "load", lambda spec: loaded.append(spec) or object())
    shared, first, other = SharedModel(), ModelSpec("m"), ModelSpec("m", dtype="float16")
    assert shared.load(first) is shared.load(ModelSpec("m"))
    assert shared.load(other) is not shared.load(first)
    assert loaded == [first, other, first], "only the last one is kept"


def test_authors_figures_of_their_own_method_are_no_re_run() -> None:
    kinds = {
        figure.source.kind
        for name in list_tables()
        for row in load_table(name).rows
        for figure in row.published.values()
        if row.method == "cen-prune"
    }
    assert kinds == {"paper"}


def test_dry_run_prints_the_runs_and_touches_nothing(
    with_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    words = ["paper-table", "llava_next_7b", "--dry-run", "--output", str(out)]
    assert main([*words, "--tasks", "pope", "--data-root", "DATA"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("python -m llava.eval run --model-path") == 4
    assert "--mm-next-protocol zoo-release" in printed and "--data-root DATA" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nothing"], "unknown table"),
        ([MAIN, "--tasks", "docvqa"], "docvqa"),
        ([MAIN, "--methods", "zoom"], "zoom"),
        ([MAIN, "--limit", "-1"], "--limit"),
        ([MAIN, "--batch-size", "0"], "--batch-size"),
        ([MAIN, "--workers", "-1"], "--workers"),
    ],
)
def test_bad_flags_are_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code(lambda: main(["paper-table", *words])) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_without_a_name_the_tables_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["paper-table"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_tables()


def test_half_a_run_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no finished run"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "timings.jsonl").write_text("")
    with pytest.raises(TableError, match="no finished run"):
        read_run(tmp_path)
