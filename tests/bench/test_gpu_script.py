"""scripts/gpu.sh without a GPU: its commands are understood, parts fail alone, and a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.bench import gpu
from llava.bench.command import build_parser
from llava.bench.command import main as bench
from llava.bench.gpu import Found, Part, main, parts, run_parts
from llava.bench.ratios import render_ratios
from llava.bench.report import render
from llava.bench.stage import CAPTURED, IMAGES, METHODS, stage_calls, time_call
from llava.eval.__main__ import build_parser as evaluation

HANGS = "import time; time.sleep(60)"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_understood(small: bool, tmp_path: Path) -> None:
    found = list(parts(tmp_path, small, "abc"))
    assert len({part.name for part in found}) == len(found) == 8
    programs = set()
    for _, program, *words in [words for part in found for words in part.commands]:
        programs.add(program)
        if program == "llava.bench":
            args = build_parser().parse_args([*words, "--device", "cpu"])
            assert args.output.parent == Path() and args.commit == "abc"
        elif program == "llava.eval":
            evaluation().parse_args(["cpu" if word == "cuda" else word for word in words])
        elif program == "pytest":
            folder = words[-3] if "--ignore" in words else words[-1]
            assert (ROOT / folder).is_dir() and "-q" not in words, "-qq prints no count"
            assert ("--at-least" in words) == (not small)
    assert programs == {"llava.bench", "llava.bench.gpu", "llava.eval", "pytest"}


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2 and "finds no CUDA GPU" in capsys.readouterr().err


def write_and_fail(file: Path, code: int) -> tuple[str, ...]:
    return (
        "-c",
        f"import sys; open({str(file)!r}, 'w').write('5'); print('said'); sys.exit({code})",
    )


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(out: Path, small: bool, commit: str | None) -> Any:
        def read(_: str) -> Found:
            return Found(json.loads((out / "n").read_text()), "five")

        def lost(_: str) -> Found:
            return Found(gpu.read_json(out / "nothing"), "")

        assert json.loads(file.read_text())["parts"] == [], "nothing of an earlier run is left"
        yield Part("good", (write_and_fail(out / "n", 0),), read, 60)
        assert len(json.loads(file.read_text())["parts"]) == 1, "written at once"
        yield Part("bad", (write_and_fail(out / "n", 3),), read, 60)
        yield Part("wrong", (("-c", "print('x' * 40000)"),), lambda _: Found(7, "7", False), 60)
        yield Part("empty", (("-c", "pass"),), lost, 60)
        yield Part("hangs", (("-c", HANGS),), read, 1)
        yield Part("slow", (("-c", HANGS),), read, 60)
        yield Part("absent", (), read, 60, "not in this tree")
        yield Part("late", (("-c", "pass"),), read, 60)

    file = tmp_path / "out" / "gpu.json"
    file.parent.mkdir()
    file.write_text("of an earlier run")
    monkeypatch.setattr(gpu, "parts", some)
    assert run_parts(file.parent, True, 3.0, "abc") == 1
    assert list(file.parent.iterdir()) == [file]
    result = json.loads(file.read_text())
    assert result["commit"]["commit"] == "abc"
    found = {part["name"]: (part["status"], part["line"]) for part in result["parts"]}
    assert found["good"] == ("done", "five") and result["parts"][0]["result"] == 5
    assert found["bad"] == ("failed", "five")
    assert found["empty"][0] == "failed" and "cannot read" in found["empty"][1]
    assert found["wrong"] == ("failed", "7") and result["parts"][2]["result"] == 7
    assert len(result["parts"][2]["output"]) == 30_000
    assert found["hangs"] == ("failed", "five (stopped after 1 s)")
    assert found["slow"][0] == "failed" and "its time was over" in result["parts"][5]["output"]
    assert found["absent"] == ("left out", "not in this tree")
    assert found["late"] == ("left out", "no time was left")
    table = capsys.readouterr().out.rpartition("On a CPU")[2] or "no table"
    assert all(f"| {name} | {status} |" in table for name, (status, _) in found.items())


def test_answers_are_compared_by_arm(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, last in zip(folders, ("yes", "no"), strict=True):
        folder.mkdir()
        rows = [
            {"arm": arm, "question_id": n, "answer": last if (arm, n) == ("zoo@64", 1) else "x"}
            for arm in gpu.ARMS
            for n in range(2)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts, line, good = gpu._read_answers(folders)
    assert counts["zoo@64"] == {"equal": 1, "of": 2} and counts["none"] == {"equal": 2, "of": 2}
    assert "zoo@64 1 of 2 equal" in line and "below 80%" in line and not good
    assert gpu._read_answers([folders[0], folders[0]]).good


def test_a_gpu_file_is_shown_as_a_whole_and_by_part(
    tmp_path: Path, bench_result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"method": "zoo-exact", "tokens": 576, "first_ms": 9, "p5_ms": 0.2, "p95_ms": 0.36}
    row |= {"median_ms": 0.25, "waits": 0, "peak_bytes": 3 * 2**19}
    rows = [{**row, "keep": 64, "graph_ms": 0.125}, {**row, "keep": 128, "waits": None}]
    part = {"status": "done", "seconds": 1.5, "line": "fine"}
    result = {
        **{key: bench_result[key] for key in ("schema_version", "command", "commit", "versions")},
        "kind": "gpu",
        "machine": {"gpu": "Card 1"},
        "small": False,
        "parts": [
            {"name": "tests on CUDA", **part, "result": None},
            {"name": "stage alone", **part, "result": rows},
            {"name": "bench llava-tiny", **part, "result": bench_result},
        ],
    }
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result))
    assert bench(["--from", str(file)]) == 0
    text = capsys.readouterr().out
    assert "0.25" in text and "On Card 1:" in text and render(bench_result) in text
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-llava-tiny:begin -->\n<!-- bench-llava-tiny:end -->\n")
    one = ["--from", str(file), "--part", "bench llava-tiny", "--plot", str(tmp_path / "p.png")]
    assert bench([*one, "--update", str(page)]) == 0
    assert capsys.readouterr().out == render(bench_result) + "\n"
    assert render_ratios(bench_result) in page.read_text() and (tmp_path / "p.png").exists()
    bench_result["conditions"]["device"] = "cuda"
    file.write_text(json.dumps(result))
    assert bench([*one, "--update", str(page)]) == 0
    assert render(bench_result) in page.read_text()
    page.write_text("<!-- stage-alone:begin -->\n<!-- stage-alone:end -->\n")
    capsys.readouterr()
    assert bench(["--from", str(file), "--part", "stage alone", "--update", str(page)]) == 0
    text = capsys.readouterr().out
    assert text.strip() in page.read_text() and "Card 1; torch" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["576 → 64", "0.25", "0.20 to 0.36", "0.12", "0.3", "0", "1.5", "9.0"] in [
        line[2:-1] for line in cells
    ]
    assert ["576 → 128", "0.25", "0.20 to 0.36", "—", "—", "—", "1.5", "9.0"] in [
        line[2:-1] for line in cells
    ]
    for words, said in (
        (["--part", "tests on CUDA"], "shown alone: 'bench llava-tiny', 'stage alone'"),
        (["--part", "stage alone", "--plot", str(tmp_path / "q.png")], "leave out --plot"),
        (["--plot", str(tmp_path / "q.png")], "choose one with --part"),
    ):
        with pytest.raises(SystemExit):
            bench(["--from", str(file), *words])
        assert said in capsys.readouterr().err


def test_a_part_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    """A pipe that a child of it keeps open would hold the run up for as long as the child lives."""
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HANGS!r}])"
    part = Part("x", (("-c", child),), lambda _: Found(None, "read"), 1)
    start = time.monotonic()
    record = gpu.run_part(part, 60)
    assert time.monotonic() - start < 20
    assert (record["status"], record["line"]) == ("failed", "read (stopped after 1 s)")


def test_the_stage_alone_has_a_row_for_every_method_and_budget() -> None:
    device = torch.device("cpu")
    calls = stage_calls(device, torch.float32, 32)
    rows = [{**name, **time_call(call, device, 0.0)} for name, call in calls]
    budgets = [keep for _, _, budgets in IMAGES for keep in budgets]
    assert len(rows) == len(METHODS) * len(budgets)
    tracked = json.loads((ROOT / "playground" / "results" / "stage-h200.json").read_text())
    assert rows[0].keys() >= tracked["rows"][0].keys()
    key = ("method", "tokens", "keep")
    assert {tuple(r[k] for k in key) for r in rows} == {
        tuple(r[k] for k in key) for r in tracked["rows"]
    }
    assert all(row["waits"] is None for row in rows)
    assert set(CAPTURED) < set(METHODS) and "random" not in CAPTURED


@pytest.mark.slow
def test_a_dry_run_of_every_line(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "COMMIT": "abc"}
    script = [str(ROOT / "scripts" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(["bash", *script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["status"] for part in result["parts"]} - {"left out"} == {"done"}
    assert list(tmp_path.iterdir()) == [tmp_path / "gpu.json"]
    assert result["small"] and "nothing here is a measurement" in done.stdout
