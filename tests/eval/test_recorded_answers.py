"""Recorded answers of LLaVA-1.5-13B through the package's commands: the published figures."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval import eval_pope, eval_science_qa
from llava.eval.tasks import pope

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def unpacked(goldens: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`unpacked(name)`: a copy of the recorded files of one benchmark, decompressed."""

    def unpack(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in (goldens / "real" / name).glob("*.gz"):
            with gzip.open(path) as packed, (folder / path.stem).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        shutil.copyfile(goldens / "real" / name / "case.json", folder / "case.json")
        return folder

    return unpack


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def change_answer(folder: Path, index: int, text: str) -> None:
    """Let the model have said something else to one question."""
    path = folder / "answers.jsonl"
    rows = read(path)
    assert rows[index]["text"] != text
    rows[index]["text"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def published(folder: Path) -> dict:
    return json.loads((folder / "case.json").read_text("utf-8"))


def pope_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    """{split: {f1, accuracy}} as the command prints them."""
    labels = folder / "coco"
    labels.mkdir(exist_ok=True)
    for path in folder.glob("coco_pope_*.json"):
        path.rename(labels / path.name)
    words = ["--annotation-dir", labels, "--question-file", folder / "questions.jsonl"]
    words += ["--result-file", folder / "answers.jsonl"]
    assert eval_pope.main([str(word) for word in words]) == 0
    blocks = capsys.readouterr().out.split("=" * 36)[:-1]
    found = {}
    for block in blocks:
        split, accuracy, f1 = (
            re.search(rf"{name}: ([\w.]+)", block)[1]  # type: ignore[index]
            for name in ("Category", "Accuracy", "F1 score")
        )
        found[split] = {"f1": float(f1), "accuracy": float(accuracy)}
    return found


def test_pope(unpacked: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpacked("pope")
    case = published(folder)
    figures = pope_figures(folder, capsys)
    assert figures == case["exact"]
    for split, figure in figures.items():
        assert round(100 * figure["f1"], 1) == case["published"][f"{split}_f1"]
    change_answer(folder, 0, "Yes")
    changed = pope_figures(folder, capsys)
    assert changed["adversarial"] != case["exact"]["adversarial"], "one answer decides"
    assert changed["random"] == case["exact"]["random"]


def test_pope_in_a_run(unpacked: Callable[[str], Path]) -> None:
    """The benchmark's own metrics, the mean of the splits among them."""
    folder = unpacked("pope")
    labels = {
        split: iter([row["label"] for row in read(folder / f"coco_pope_{split}.json")])
        for split in pope.SPLITS
    }
    splits = [row["category"] for row in read(folder / "questions.jsonl")]
    texts = [row["text"] for row in read(folder / "answers.jsonl")]
    right = [next(labels[split]) for split in splits]
    metrics = pope.score(texts, right, splits, range(len(texts)))
    expected = published(folder)["published"]
    assert {name: round(metrics[name].value, 1) for name in expected} == expected


def science_qa_result(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, object]]:
    """What the command prints, and the content of its summary file."""
    result = folder / "summary.json"
    words = ["--base-dir", folder, "--result-file", folder / "answers.jsonl"]
    words += ["--output-file", folder / "analysis.json", "--output-result", result]
    assert eval_science_qa.main([str(word) for word in words]) == 0
    return capsys.readouterr().out, json.loads(result.read_text("utf-8"))


def test_science_qa(unpacked: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpacked("science_qa")
    case = published(folder)
    official = json.loads((folder / "result.json").read_text("utf-8"))
    printed, summary = science_qa_result(folder, capsys)
    assert printed == "Total: 4241, Correct: 3155, Accuracy: 74.39%, IMG-Accuracy: 71.64%\n"
    assert f"{case['exact']['image_accuracy']:.2f}%" in printed
    assert round(case["exact"]["image_accuracy"], 1) == case["published"]["image_accuracy"]
    assert summary["acc"] == case["exact"]["accuracy"]
    outputs = {row["question_id"]: row["text"] for row in read(folder / "answers.jsonl")}
    whole = json.dumps({**official, "outputs": outputs}, indent=2)
    assert (folder / "summary.json").read_text("utf-8") == whole
    assert len(official["results"]) == 4241
    change_answer(folder, 0, "A")
    _, changed = science_qa_result(folder, capsys)
    assert changed["results"] != official["results"] and changed["correct"] == 3154


def test_vizwiz(
    unpacked: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = unpacked("vizwiz")

    def convert() -> bytes:
        target = folder / "made.json"
        words = ["--annotation-file", folder / "questions.jsonl"]
        words += ["--result-file", folder / "answers.jsonl", "--result-upload-file", target]
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            script = SCRIPTS / "convert_vizwiz_for_submission.py"
            runpy.run_path(str(script), run_name="__main__")
        assert not stop.value.code
        return target.read_bytes()

    uploaded = (folder / "upload.json").read_bytes()
    assert convert() == uploaded
    assert "total results: 8000, total split: 8000, error_line: 0" in capsys.readouterr().out
    change_answer(folder, 7999, "Unanswerable?!")
    assert convert() == uploaded, "the server's rules leave punctuation out"
    change_answer(folder, 7999, "A pen")
    assert convert() != uploaded
