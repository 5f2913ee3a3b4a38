"""The benchmark in docs/add_a_benchmark.md is complete: as a file it runs."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.__main__ import main
from llava.eval.tasks import base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    text = (ROOT / "docs" / "add_a_benchmark.md").read_text()
    file = tmp_path / "toy.py"
    file.write_text(re.search(r"^```python\n(.*?)^```", text, flags=re.M | re.S)[1])
    spec = importlib.util.spec_from_file_location("toy", file)
    assert spec is not None and spec.loader is not None
    base.list_benchmarks()  # built-in ones first
    before = set(base._BENCHMARKS._entries)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (added,) = set(base._BENCHMARKS._entries) - before
    yield added
    del base._BENCHMARKS._entries[added]


def test_it_runs(
    name: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "toy"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "images" / "a.png")
    questions = [
        {"question_id": number, "image": "a.png", "text": text, "answer": answer}
        for number, (text, answer) in enumerate([("How many wheels?", "four"), ("Where?", "x")])
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    words = ["run", "--task", name, "--model-path", str(checkpoint), "--workers", "0"]
    words += ["--data-root", str(tmp_path / "data"), "--output", str(tmp_path / "output")]
    assert main([*words, "--arm", "none", "--arm", "random@16"]) == 0
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"none", "random@16"}
    lines = (tmp_path / "output" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for arm in metrics["arms"].values():
        assert arm["metrics"]["accuracy"]["n"] == 2


def test_its_scores(name: str, tmp_path: Path) -> None:
    benchmark = base.get_benchmark(name)(tmp_path)
    items = [
        base.Item(number, number, (image,), "", "", {"answer": "four"})
        for number, image in enumerate(("a.png", "a.png", "b.png"))
    ]
    metric = benchmark.score(items, ["Four.", "five", "four"])["accuracy"]
    assert metric.value == pytest.approx(200 / 3) and metric.n == 3 and metric.scale == 100


def test_missing_files_are_one_line(
    name: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--task", name, "--model-path", str(checkpoint), "--arm", "none"]
    assert main([*words, "--data-root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "questions.jsonl" in error and error.count("\n") == 1
    assert "prepare" not in error  # nothing can get them


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"question_id": 1, "image": "a.png", "text": "Where?"}',
            "question 1 of toy lacks answer",
        ),
        ('[{"question_id": 1}]', "is not a JSON object; write one object a line"),
    ],
)
def test_damaged_questions_are_one_line(
    name: str, tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "questions.jsonl").write_text(content)
    with pytest.raises(base.TaskError, match=reason) as error:
        base.get_benchmark(name)(tmp_path).items()
    assert "prepare" not in str(error.value)
