"""The study behind `compute=auto`: what is tracked reaches its limits, and it can be made again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llava.pruning.precision import product_precision

ROOT = Path(__file__).parents[1]
TRACKED = ROOT / "playground" / "results" / "compute-study.json"


def load_program() -> ModuleType:
    file = ROOT / "benchmarks" / "compute_study.py"
    spec = importlib.util.spec_from_file_location("compute_study", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compute_study = load_program()


def test_the_default_passes_on_all_that_is_trained(monkeypatch) -> None:
    result = json.loads(TRACKED.read_text())
    assert result["run"]["git"]["dirty"] is False
    trained = [row for row in result["rows"] if row["trained"]]
    cases = {(row["source"], row["dtype"], row["method"], row["compute"]) for row in trained}
    assert len(cases) == 2 * 2 * 2 * 4
    assert result["passing"] == compute_study.passing(result["rows"])
    monkeypatch.setattr("llava.pruning.precision.multiplies_bf16_fast", lambda device: True)
    chosen = product_precision("auto", torch.bfloat16, torch.device("cpu"))
    assert result["passing"][chosen]


def test_the_document_shows_the_result() -> None:
    file, result = ROOT / "docs" / "results.md", json.loads(TRACKED.read_text())
    ((_, text),) = compute_study.pages([file], result)
    assert text == file.read_text(), (
        f"run {compute_study.PROGRAM} --from-result {TRACKED.relative_to(ROOT)} --update {file}"
    )


def test_a_small_study(tmp_path: Path, monkeypatch, capsys) -> None:
    """Random weights: the limits are for trained ones, but float32 is next to float64 on any."""
    monkeypatch.setattr(compute_study, "MODEL", tmp_path / "nothing")
    source = compute_study.random_source(1, dv=16, width=64)
    rows = compute_study.measure([source])
    assert len(rows) == 2 * 2 * 4
    found = {(row["dtype"], row["method"], row["compute"]): row for row in rows}
    for dtype in ("bfloat16", "float16"):
        for method in compute_study.ESTIMATORS:
            exact, rounded = (found[dtype, method, name] for name in ("float32", "bf16"))
            assert exact["spearman_mean"] > 0.99999
            assert 0.99 < rounded["spearman_mean"] < 1
    worse = [row | {"trained": True, "kept_equal": 1.0, "spearman_mean": 1.0} for row in rows]
    assert compute_study.passing(worse) == {"float32": True, "split": True, "bf16": True}
    worse[-1]["kept_equal"] = 0.98
    assert compute_study.passing(worse)["bf16"] is False


def test_bad_numbers_are_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        compute_study.main(["--images", "0"])
    assert end.value.code == 2
    assert "--images must be at least 1" in capsys.readouterr().err
