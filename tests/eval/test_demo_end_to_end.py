"""The demo playground through the real commands and scripts, on llava-tiny."""

import csv
import io
import json
from pathlib import Path

import pytest
from test_scripts import ROOT, run

from llava.eval.__main__ import main
from llava.eval.demo import write_playground
from llava.eval.tasks.base import get_benchmark, list_benchmarks
from llava.world.benchmark_files import WRITERS

MODEL = ROOT / "playground/llava-tiny"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_playground(tmp_path_factory.mktemp("demo") / "eval", 24)


@pytest.mark.parametrize("task", WRITERS)
def test_a_benchmark_reads_its_demo_files_and_scores_the_truth(root: Path, task: str) -> None:
    assert task in list_benchmarks()
    for protocol in get_benchmark(task).protocols:
        benchmark = get_benchmark(task)(root, protocol)
        items = benchmark.items()
        assert items and benchmark.load_image(next(i for i in items if i.images).images[0])
        assert len(benchmark.data_hash()) == 64


def test_right_answers_get_full_marks(root: Path) -> None:
    """What the files call the answer is one that the scorer accepts."""
    answers = {
        "gqa": lambda data: data["answer"],
        "pope": lambda data: data["label"],
        "vqav2": lambda data: data["answers"][0],
        "textvqa": lambda data: data["answers"][0],
        "mme": lambda data: data["answer"],
        "seed": lambda data: data["answer"],
    }
    for task, answer_of in answers.items():
        benchmark = get_benchmark(task)(root)
        items = benchmark.items()
        metrics = benchmark.score(items, [answer_of(item.data) for item in items])
        headline = metrics[benchmark.headline]
        assert headline.value == pytest.approx(headline.scale), task


@pytest.mark.parametrize(
    ("script", "task"),
    [("v1_5/eval/pope.sh", "pope"), ("v1_5/eval/sqa.sh", "scienceqa"), ("v1_6/eval/gqa.sh", "gqa")],
)
def test_a_benchmark_script_runs_for_real(
    root: Path, tmp_path: Path, script: str, task: str
) -> None:
    out = tmp_path / "out"
    done = run(
        Path("scripts") / script,
        *("zoo-exact", "64", "--limit", "3", "--max-new-tokens", "4", "--device", "cpu"),
        *("--workers", "0"),
        timeout=500,
        MODEL=str(MODEL),
        DATA_ROOT=str(root),
        OUTPUT=str(out),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == task
    (arm,) = metrics["arms"].values()
    assert arm["pruning"] == {"method": "zoo-exact", "keep_tokens": 64}
    assert arm["tokens_mean"] == 64.0
    assert len((out / "answers.jsonl").read_text().splitlines()) == 3


def test_a_table_demo_runs_to_its_report_and_again_from_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["paper-table", "ablation_step", "--demo", "--demo-samples", "6", "--device", "cpu"]
    words += ["--methods", "zoo-exact", "--output", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "DEMO" in printed and "POPE (n=6)" in printed and "gap" not in printed
    cells = list(csv.DictReader(io.StringIO((tmp_path / "ablation_step.csv").read_text())))
    pope = [cell for cell in cells if cell["column"] == "pope"]
    assert [cell["budget"] for cell in pope] == ["", "64"]
    assert all(cell["ours"] and cell["n"] == "6" and not cell["gap"] for cell in pope)
    report = json.loads((tmp_path / "ablation_step.json").read_text())
    assert [row["tokens"] for row in report["rows"]] == [576.0, 64.0]
    page = (tmp_path / "ablation_step.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # two plots and the kept tokens
    assert main(words) == 0
    assert "reusing 1 of 1 batches" in capsys.readouterr().out
