"""scripts/gpu.sh without a GPU: its commands are understood, parts fail alone, and a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.bench import gpu
from llava.bench.command import build_parser
from llava.bench.gpu import Part, main, parts, run_parts
from llava.bench.stage import IMAGES, METHODS, stage_calls, time_call
from llava.eval.__main__ import build_parser as evaluation

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_understood(small: bool, tmp_path: Path) -> None:
    found = list(parts(tmp_path, small, "abc"))
    assert len({part.name for part in found}) == len(found) == 7
    programs = set()
    for _, program, *words in [words for part in found for words in part.commands]:
        programs.add(program)
        if program == "llava.bench":
            args = build_parser().parse_args([*words, "--device", "cpu"])
            assert args.output.parent == tmp_path and args.commit == "abc"
        elif program == "llava.eval":
            evaluation().parse_args(["cpu" if word == "cuda" else word for word in words])
        elif program == "pytest":
            assert (ROOT / words[-1]).is_dir()
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
        def read(_: str) -> tuple[Any, str]:
            return json.loads((out / "n").read_text()), "five"

        def lost(_: str) -> tuple[Any, str]:
            return gpu.read_json(out / "nothing"), ""

        written = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}
        assert not written
        yield Part("good", (write_and_fail(out / "n", 0),), read)
        assert len(json.loads((out / "gpu.json").read_text())["parts"]) == 1, "written at once"
        yield Part("bad", (write_and_fail(out / "n", 3),), read)
        yield Part("empty", (("-c", "pass"),), lost)
        yield Part("slow", (("-c", "import time; time.sleep(60)"),), read)
        yield Part("absent", (), read, "not in this tree")
        yield Part("late", (("-c", "pass"),), read)

    monkeypatch.setattr(gpu, "parts", some)
    assert run_parts(tmp_path / "out", True, 2.0, "abc") == 1
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["commit"]["commit"] == "abc"
    found = {part["name"]: (part["status"], part["line"]) for part in result["parts"]}
    assert found["good"] == ("done", "five") and result["parts"][0]["result"] == 5
    assert found["bad"] == ("failed", "five")
    assert found["empty"][0] == "failed" and "cannot read" in found["empty"][1]
    assert found["slow"][0] == "failed" and "time for this run" in result["parts"][3]["output"]
    assert found["absent"] == ("left out", "not in this tree")
    assert found["late"] == ("left out", "no time was left")
    table = capsys.readouterr().out.rpartition("On a CPU")[2]
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
    counts, line = gpu._read_answers(folders)
    assert counts["zoo@64"] == {"equal": 1, "of": 2} and counts["none"] == {"equal": 2, "of": 2}
    assert "zoo@64 1 of 2 equal" in line


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
    assert all(row["waits"] is None for row in rows) or torch.cuda.is_available()


@pytest.mark.slow
def test_a_dry_run_of_every_line(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "COMMIT": "abc"}
    script = [str(ROOT / "scripts" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(["bash", *script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["status"] for part in result["parts"][1:]} == {"done"}
    assert result["small"] and "nothing here is a measurement" in done.stdout
