"""The whole command: its files, its resume, and that every figure comes out of the run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_llava import exit_code

from llava.eval.__main__ import main
from llava.eval.commands import quickstart as command
from llava.eval.commands.quickstart import PICTURES, TABLE
from llava.eval.engine import provenance
from llava.eval.engine.provenance import identify
from llava.eval.engine.run import FILES
from llava.eval.report.result import full_section, render
from llava.pruning import list_methods
from llava.pruning.catalogue import figures

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("answers.jsonl", "metrics.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def output(finished: Path, quickstart: Callable[..., int]) -> Path:
    """Output folder of one finished run; made once, later uses find everything answered."""
    if not (finished / "run.json").exists():
        assert quickstart(finished, "--save-result", str(finished / "result.json")) == 0
    return finished


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def unpruned(output: Path) -> dict:
    """Accuracy of the unpruned model."""
    return read(output / "metrics.json")["arms"]["none"]["metrics"]["accuracy"]


def test_files_and_their_contents(output: Path, checkpoint: Path) -> None:
    for name in (*FILES, TABLE, *PICTURES):
        assert (output / name).stat().st_size > 0
    info = read(output / "run.json")
    assert info["status"] == "done" and info["schema_version"] == 2
    assert info["config"]["seed"] == 0 and next(iter(info["arms"])) == "none"
    assert info["versions"]["torch"] and info["machine"]["cpu_count"] >= 1
    assert info["wall_seconds"] > 0 and "quickstart" in info["command"]
    arms = read(output / "metrics.json")["arms"]
    accuracy = {name: arm["metrics"]["accuracy"]["value"] for name, arm in arms.items()}
    assert accuracy["none"] == 100.0, "the fixture's answers are the model's own"
    assert accuracy["random@64"] < 100.0
    assert set(arms["none"]["metrics"]) == {"accuracy", "color", "count"}
    answers = [json.loads(line) for line in (output / "answers.jsonl").open()]
    assert len({line["answer_id"] for line in answers}) == len(answers) == 9 * len(arms)


def test_result_file_renders_the_printed_table(output: Path) -> None:
    printed = (output / "table.md").read_text()
    result = read(output / "result.json")
    assert printed == render(result)
    section = full_section(result).splitlines()
    assert set(printed.splitlines()) <= set(section)
    assert section.count("</details>") == 2


def test_second_run_answers_nothing_again(
    output: Path, quickstart: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (output / name).read_bytes() for name in (*DETERMINISTIC, "table.md")}
    assert quickstart(output) == 0
    assert "reusing 3 of 3 batches" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.95])
def test_a_cut_log_ends_in_the_same_bytes(
    output: Path, tmp_path: Path, quickstart: Callable[..., int], share: float
) -> None:
    shutil.copytree(output / "runs", tmp_path / "runs")
    (log,) = (tmp_path / "runs").glob("*/log/answers-0.jsonl")
    content = log.read_bytes()
    log.write_bytes(content[: int(share * len(content))])
    assert quickstart(tmp_path) == 0
    for name in DETERMINISTIC:
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_a_killed_process_is_resumed(
    output: Path, tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    """SIGKILL after the first batch is on disk; the second process ends in the same bytes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "llava.eval", *arguments(tmp_path)]
    process = subprocess.Popen(
        run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300  # the machine may be busy
        while not any(log.stat().st_size for log in tmp_path.glob("runs/*/log/answers-0.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (log,) = tmp_path.glob("runs/*/run.json")
    assert read(log)["status"] == "running"
    assert main(arguments(tmp_path)) == 0
    assert read(tmp_path / "run.json")["reused_batches"] >= 1
    for name in DETERMINISTIC:
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_one_weight_changes_the_table(
    output: Path, checkpoint: Path, tmp_path: Path, quickstart: Callable[..., int]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = load_file(model / "model.safetensors")
    weights["model.mm_projector.2.bias"][0] += 3.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert quickstart(output, model=model) == 0
    assert unpruned(output)["value"] < 100.0
    assert len(list((output / "runs").iterdir())) == 2, "the other model's answers stay apart"
    assert quickstart(output) == 0
    assert unpruned(output)["value"] == 100.0


def test_all_methods_run_side_by_side(
    tmp_path: Path, quickstart: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every registered method once, those of a plain run first; the catalogue reads the file."""
    file = tmp_path / "result.json"
    budgets = ["--budgets", "576", "64"]
    extra = ["--methods", "all", *budgets, "--limit", "3", "--save-result", str(file)]
    assert quickstart(tmp_path, *extra) == 0
    result = read(file)
    assert result["config"]["methods"][: len(command.METHODS)] == list(command.METHODS)
    assert sorted(result["config"]["methods"]) == sorted(list_methods())
    rows = [row for row in result["rows"] if row["budget"] == 64]
    assert sorted(row["method"] for row in rows) == sorted(set(list_methods()) - {"none"})
    assert len({row["arm"] for row in result["rows"]}) == len(result["rows"])
    for row in rows:
        assert row["unavailable"] is None, row
        assert row["tokens_min"] == row["tokens_max"] == 64
    labels = {row["method"]: row["label"] for row in rows}
    assert labels["cdpruner"] == "cdpruner(relevance=none)"
    assert labels["cen-prune"] == "cen-prune(divprune)"
    assert labels["zoo"] == "zoo"
    out = capsys.readouterr().out
    assert all(f"| {label} " in out for label in labels.values())
    ours = figures(file)
    assert set(ours) == set(list_methods())
    assert ours["cdpruner"].endswith("(relevance=none)")


def test_every_setting_has_its_own_key(
    arguments: Callable[..., list[str]], checkpoint: Path, benchmark_folder: Path, tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())

    def key(*extra: str, model: Path = checkpoint, data: Path = benchmark_folder) -> str:
        args = parser.parse_args(arguments(tmp_path, *extra, model=model))
        args.benchmark, args.image_folder, args.command_line = data, None, ""
        return identify(command.request_from(args))["run_key"]

    assert key() == key()
    assert key() == key("--save-result", "elsewhere.json"), "where results go is no setting"
    keys = [
        key(),
        key("--seed", "1"),
        key("--batch-size", "3"),
        key("--limit", "3"),
        key("--methods", "none", "random"),
        key("--budgets", "64", "32"),
    ]
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(checkpoint, model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    keys.append(key(model=model))
    shutil.copytree(benchmark_folder, data)
    (data / "answers.jsonl").write_text((data / "answers.jsonl").read_text() + "\n")
    keys.append(key(data=data))
    (data / "images" / "0.png").write_bytes((data / "images" / "1.png").read_bytes())
    keys.append(key(data=data))
    assert len(set(keys)) == len(keys)


def test_sources_that_make_answers_are_hashed() -> None:
    files = {
        file.relative_to(provenance.PACKAGE_ROOT).as_posix()
        for pattern in provenance.ANSWER_SOURCES
        for file in provenance.PACKAGE_ROOT.glob(pattern)
    }
    assert {
        "conversation.py",
        "model/llava_arch.py",
        "pruning/methods/zoo.py",
        "eval/engine/runner.py",
        "eval/prompts.py",
        "eval/rules/exact_match.py",
    } <= files
    assert "eval/tables.py" not in files


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "zoom"], "did you mean"),
        (
            ["--methods", "zoo:directions=8"],
            "--methods takes names, and a budget",
        ),
        (["--budgets", "0"], "--budgets"),
        (["--batch-size", "0"], "--batch-size"),
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--benchmark", "/nowhere"], "/nowhere"),
        (["--image-folder", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path,
    quickstart: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert exit_code(lambda: quickstart(tmp_path, *extra)) == 2
    (line,) = [
        line for line in capfd.readouterr().err.splitlines() if not line.startswith("Loading")
    ]
    assert message in line


def test_an_unreadable_image_is_counted(
    benchmark_folder: Path, tmp_path: Path, quickstart: Callable[..., int]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(benchmark_folder / "images", images)
    (images / "0.png").write_bytes(b"no image")
    flags = ["--image-folder", str(images), "--methods", "none", "--budgets", "64"]
    assert quickstart(tmp_path / "output", *flags) == 1
    assert read(tmp_path / "output" / "run.json")["failed_items"] > 0
    found = unpruned(tmp_path / "output")
    assert found["value"] == 100.0 and found["n"] < 9
    for image in images.iterdir():
        image.write_bytes(b"no image")
    assert quickstart(tmp_path / "output", *flags) == 2
