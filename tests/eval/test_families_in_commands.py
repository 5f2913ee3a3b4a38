"""Every command on a checkpoint of another family: a tiny Qwen2.5-VL on a drawn benchmark."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))

from saved import save_checkpoint
from tiny_llava import build_benchmark, exit_code

from llava.bench.command import main as bench
from llava.eval import run_llava
from llava.eval.__main__ import main
from llava.families import load
from llava.pruning import attach
from llava.sampling import Sampling
from llava.serve.session import Session

TABLE = """
title = "Tiny"
model = "nothing"
family = "qwen2_5_vl"
[[columns]]
key = "tiny"
title = "tiny"
task = "llava-tiny"
metric = "accuracy"
[[rows]]
method = "none"
label = "unpruned"
[[rows]]
method = "zoo"
label = "ZOO-Prune"
keep_ratio = 0.2
[[rows]]
method = "visionzip"
label = "VisionZip"
keep_ratio = 0.1
"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("family") / "qwen-tiny")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, qwen: Path) -> Path:
    """A benchmark whose right answers are what the unpruned model says."""
    return build_benchmark(tmp_path_factory.mktemp("drawn") / "benchmark", qwen)


@pytest.fixture(scope="module")
def run(qwen: Path, drawn: Path) -> Callable[..., int]:
    def command(output: Path, *extra: str, model: Path = qwen) -> int:
        words = ["run", "--model-path", str(model), "--task", "llava-tiny", "--device", "cpu"]
        words += ["--data-root", str(drawn), "--output", str(output), "--batch-size", "4"]
        return main([*words, "--workers", "0", *extra])

    return command


ARMS = ("--arm", "none", "--arm", "zoo@0.2", "--arm", "prumerge@8", "--arm", "mmtok@0.2")


@pytest.fixture(scope="module")
def finished(run: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert run(output, *ARMS) == 0
    return output


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_key(output: Path) -> str:
    key: str = json.loads((output / "run.json").read_text())["run_key"]
    return key


def test_run(finished: Path) -> None:
    arms = json.loads((finished / "metrics.json").read_text())["arms"]
    assert arms["none"]["metrics"]["accuracy"]["value"] == 100.0, "its own answers are the truth"
    assert arms["zoo@0.2"]["metrics"]["accuracy"]["value"] < 100
    assert "use another method" in arms["prumerge@8"]["unavailable"]
    # A square of at most 80 x 80 pixels, 8 x 8 a token.
    assert (arms["none"]["tokens_max"], arms["zoo@0.2"]["tokens_max"]) == (100, 20)


def test_workers_and_resumed_runs_write_the_same_answers(
    run: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    assert run(tmp_path, *ARMS, "--workers", "1") == 0
    assert run_key(tmp_path) == run_key(finished)
    whole = (finished / "answers.jsonl").read_bytes()
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert run(tmp_path, *ARMS) == 0
    assert json.loads((tmp_path / "run.json").read_text())["reused_batches"] == 3
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


@pytest.mark.parametrize("file", ["chat_template.jinja", "preprocessor_config.json"])
def test_template_and_pixels_are_in_the_run_key(
    run: Callable[..., int],
    qwen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    other = shutil.copytree(qwen, tmp_path / "other")
    text = (other / file).read_text()
    (other / file).write_text(text.replace("6400", "4096").replace("assistant", "model"))
    keys = []
    for model in (qwen, other):
        assert run(tmp_path / "out", "--dry-run", "--arm", "none", model=model) == 0
        keys.append(capsys.readouterr().out.split()[-1])
    assert keys[0] != keys[1]


def test_the_saved_setting_is_the_default_arm(
    run: Callable[..., int], qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(str(qwen), device="cpu")
    other = shutil.copytree(qwen, tmp_path / "other")
    attach(loaded.model, "norm", keep_ratio=0.5)
    loaded.model.save_pretrained(other)
    assert run(tmp_path / "out", "--dry-run", model=other) == 0
    assert "norm, 50 % of the tokens" in capsys.readouterr().out


def test_flags_of_llava_are_refused(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--conv-mode", "vicuna_v1", "--arm", "none")
    assert exit_code(lambda: run(tmp_path, *flags)) == 2
    assert "leave --conv-mode out" in capfd.readouterr().err.splitlines()[-1]


def test_compare(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{finished}:none", f"{finished}:zoo@0.2"]) == 0
    assert "zoo@0.2" in capsys.readouterr().out


def test_quickstart(qwen: Path, drawn: Path, tmp_path: Path) -> None:
    words = ["quickstart", "--model-path", str(qwen), "--benchmark", str(drawn)]
    words += ["--methods", "zoo", "visionzip", "--budgets", "10", "--output", str(tmp_path)]
    assert main(words) == 0
    info = json.loads((tmp_path / "run.json").read_text())["arms"]
    assert {arm["label"] for arm in info.values()} >= {"zoo", "visionzip(attention=received)"}
    assert (tmp_path / "overlays.png").is_file()


def test_paper_table(qwen: Path, drawn: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(TABLE)
    words = ["paper-table", str(file), "--model-path", str(qwen), "--data-root", str(drawn)]
    words += ["--output", str(tmp_path / "out"), "--device", "cpu", "--workers", "0"]
    assert main(words) == 0
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert "ZOO-Prune" in table and "not available" not in table
    assert (tmp_path / "out" / "kept_tokens.png").is_file()


def test_run_llava(qwen: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(drawn / "images" / "0.png")
    words = ["--model-path", str(qwen), "--image-file", image, "--device", "cpu"]
    words += ["--temperature", "0", "--max_new_tokens", "5"]
    answers = []
    for pruning in ([], ["--pruner", "zoo", "--keep-ratio", "0.2"]):
        assert run_llava.main([*words, "--query", "What is it?", *pruning]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    two = [*words, "--image-file", f"{image},{image}", "--query", "Are both the same?"]
    assert run_llava.main(two) == 0


def test_bench_says_where_times_are(qwen: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model-path", str(qwen), "--device", "cpu", "--dtype", "float32"]
    assert exit_code(lambda: bench(words)) == 2
    assert "timings.jsonl" in capfd.readouterr().err.splitlines()[-1]


def test_chat(qwen: Path, drawn: Path, tmp_path: Path) -> None:
    loaded = load(str(qwen), device="cpu")
    image = Image.open(drawn / "images" / "0.png")
    session = Session(loaded, image, Sampling(temperature=0, max_new_tokens=5))
    session.use_method("zoo", {"keep_ratio": 0.2})
    first = session.ask("What is it?")
    assert first.cost is not None and (first.cost.before, first.cost.after) == (100, 20)
    second = session.ask("And now?")
    assert second.status().startswith("100 -> 20 tokens (20.0 %)")
    session.save_overlay(tmp_path / "kept.png")
    dimmed = Image.open(tmp_path / "kept.png")
    assert dimmed.size == image.size
    assert sum(ImageStat.Stat(dimmed).sum) < sum(ImageStat.Stat(image).sum)
    whole = session.ask_unpruned()
    assert whole.cost is not None and whole.cost.after == 100
    assert loaded.pruning is not None
