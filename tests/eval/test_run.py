"""`python -m llava.eval run`: its files, its plan, its refusals, and `compare` over its folders."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_llava import exit_code

from llava.eval.__main__ import main
from llava.eval.engine import run as execution
from llava.eval.engine.run import FILES
from llava.eval.stats import mcnemar, mean_estimate, paired_bootstrap
from llava.families.spec import ModelSpec
from llava.model.multimodal_encoder.readings import TowerReader
from llava.storage import exclusive
from llava.utils import UserInputError

Run = Callable[..., int]


@pytest.fixture(scope="module")
def run(checkpoint: Path, benchmark_folder: Path) -> Run:
    """Run the command in this process; later flags win."""

    def command(output: Path, *extra: str, data: Path = benchmark_folder) -> int:
        words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny"]
        words += ["--data-root", str(data), "--output", str(output), "--device", "cpu"]
        return main([*words, "--batch-size", "4", "--workers", "0", *extra])

    return command


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    arms = ("none", "zoo:directions=4@64", "random@0.1", "pool@31")
    assert run(output, *(word for arm in arms for word in ("--arm", arm))) == 0
    return output


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def test_metrics(finished: Path) -> None:
    metrics = read(finished / "metrics.json")
    assert (metrics["schema_version"], metrics["task"]) == (2, "llava-tiny")
    assert metrics["protocol"] == "llava"
    arms = metrics["arms"]
    assert list(arms) == ["none", "zoo:directions=4@64", "random@0.1", "pool@31"]
    assert arms["none"]["metrics"]["accuracy"]["value"] == 100.0, "its own answers are the truth"
    assert arms["none"]["metrics"]["accuracy"]["n"] == 9
    assert arms["zoo:directions=4@64"]["pruning"] == {
        "method": "zoo",
        "keep_tokens": 64,
        "options": {"directions": 4},
    }
    assert arms["zoo:directions=4@64"]["tokens_mean"] == 64
    assert arms["random@0.1"]["pruning"] == {"method": "random", "keep_ratio": 0.1}
    assert arms["random@0.1"]["tokens_max"] == 58
    assert "31" in arms["pool@31"]["unavailable"] and arms["pool@31"]["metrics"] == {}
    assert all(arm["failed_images"] == 0 for arm in arms.values())


def test_answers_and_description(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "answers.jsonl").open()]
    assert [line["index"] for line in lines] == [i for i in range(9) for _ in range(3)]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    info = read(finished / "run.json")
    assert (info["status"], info["failed_items"], info["processes"]) == ("done", 0, 1)
    assert info["config"]["template"] == "vicuna_v1" and info["data_sha256"]
    unpruned = {"pruning": None, "image": "own", "label": "the unpruned model"}
    assert info["arms"]["none"] == unpruned and info["schema_version"] == 2
    times = [json.loads(line) for line in (finished / "timings.jsonl").open()]
    assert len(times) == 3 * 3 and all(line["prefill_ms"] > 0 for line in times)


def test_the_flags_of_one_setting(run: Run, tmp_path: Path) -> None:
    flags = ["--pruner", "zoo", "--keep-tokens", "32", "--pruner-option", "directions=4"]
    assert run(tmp_path, *flags, "--limit", "3", "--max-new-tokens", "2") == 0
    (name,) = read(tmp_path / "metrics.json")["arms"]
    assert name == "zoo:directions=4@32"
    assert read(tmp_path / "run.json")["config"]["sampling"]["max_new_tokens"] == 2
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert run(tmp_path, "--preset", "paper", "--keep-ratio", "0.1", "--limit", "3") == 0
    (arm,) = read(tmp_path / "metrics.json")["arms"].values()
    assert (arm["pruning"]["method"], arm["pruning"]["keep_ratio"]) == ("zoo", 0.1)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_what_the_tower_lacks_stops_one_arm(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TowerReader.extras

    def without_attention(self, tiles: int) -> dict:
        extras = own(self, tiles)
        if "cls_attention" in extras:
            raise UserInputError("this tower has no class token")
        return extras

    monkeypatch.setattr(TowerReader, "extras", without_attention)
    flags = ["--limit", "3", "--arm", "fastervlm@64", "--arm", "grid@64"]
    assert run(tmp_path, *flags) == 0
    arms = read(tmp_path / "metrics.json")["arms"]
    assert arms["fastervlm@64"]["unavailable"] == "this tower has no class token"
    assert arms["grid@64"]["answered"] == 3


def test_chunks_are_the_whole(run: Run, finished: Path, tmp_path: Path) -> None:
    asked = []
    for number in range(2):
        output = tmp_path / str(number)
        assert run(output, "--num-chunks", "2", "--chunk-idx", str(number)) == 0
        asked += [json.loads(line)["index"] for line in (output / "answers.jsonl").open()]
    assert asked == list(range(9))


def test_a_dry_run_loads_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a dry run loads no model")

    monkeypatch.setattr(ModelSpec, "load", refuse)
    output = tmp_path / "output"
    assert run(output, "--arm", "none", "--arm", "zoo@64", "--dry-run") == 0
    plan = capsys.readouterr().out
    for part in ("9 about 4 images", "3 batches of 4", "zoo@64: zoo, 64 tokens", "run key"):
        assert part in plan
    assert not output.exists()


def test_the_dry_run_names_the_key(
    run: Run, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("none", "zoo:directions=4@64", "random@0.1", "pool@31")
    words = [word for arm in arms for word in ("--arm", arm)]
    assert run(tmp_path, *words, "--dry-run") == 0
    assert read(finished / "run.json")["run_key"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra",
    [
        ["--seed", "1"],
        ["--batch-size", "3"],
        ["--limit", "3"],
        ["--max-new-tokens", "3"],
        ["--conv-mode", "llava_v1"],
        ["--arm", "random@33"],
        ["--arm", "random:seed=2@32"],
        ["--arm", "none"],
        ["--dtype", "bfloat16"],
    ],
)
def test_every_setting_has_its_own_key(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    keys = []
    for words in ([], extra):
        assert run(tmp_path, "--arm", "random@32", *words, "--dry-run") == 0
        keys.append(capsys.readouterr().out.splitlines()[-1])
    assert keys[0].startswith("run key") and keys[0] != keys[1]


def test_another_run_withdraws_what_was_published(run: Run, tmp_path: Path) -> None:
    """Nobody may take the figures of one setting for those of another that was interrupted."""
    assert run(tmp_path, "--limit", "2") == 0
    first = read(tmp_path / "metrics.json")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(execution, "answer_batches", _interrupt)
        run(tmp_path, "--limit", "3")
    assert not any((tmp_path / name).exists() for name in FILES)
    assert run(tmp_path, "--limit", "2") == 0
    assert read(tmp_path / "metrics.json") == first
    assert read(tmp_path / "run.json")["reused_batches"] == 1


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_unreadable_images_are_counted(
    run: Run, benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(benchmark_folder, data)
    (data / "images" / "1.png").write_bytes(b"no image")
    (data / "images" / "2.png").unlink()
    questions = (data / "questions.jsonl").read_text()
    (data / "questions.jsonl").write_text(questions.replace("2.png", "2" * 5000))
    assert run(tmp_path / "output", "--arm", "none", "--arm", "grid@64", data=data) == 1
    said = capsys.readouterr()
    assert "4 of 9 items were skipped" in said.out
    arms = read(tmp_path / "output" / "metrics.json")["arms"]
    for arm in arms.values():
        assert (arm["failed_images"], arm["answered"]) == (4, 5)
        assert arm["metrics"]["accuracy"]["n"] == 5
    assert arms["none"]["metrics"]["accuracy"]["value"] == 100.0
    lines = [json.loads(line) for line in (tmp_path / "output" / "answers.jsonl").open()]
    reasons = {line["images"][0]: line["error"] for line in lines if "error" in line}
    assert "not an image" in reasons["1.png"] and "no such file" in reasons["2" * 5000]
    assert run(tmp_path / "output", "--arm", "none", "--arm", "grid@64", data=data) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "lava-tiny"], "did you mean 'llava-tiny'"),
        (["--protocol", "other"], "has no protocol 'other'"),
        (["--data-root", "/nowhere"], "/nowhere"),
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--arm", "zoom@64"], "did you mean"),
        (["--arm", "zoo:direction=3@64"], "did you mean"),
        (["--arm", "zoo@lots"], "'lots' is not a budget"),
        (["--arm", "zoo"], "keep_tokens"),
        (["--arm", "none@3"], "takes no options and no budget"),
        (["--arm", "zoo@64", "--arm", "zoo@64"], "given twice"),
        (["--arm", "pool@31"], "31"),
        (["--mm-next-protocol", "fixed2880"], "image_aspect_ratio"),
        (["--keep-tokens", "3"], "give a method too"),
        (["--preset", "papre", "--keep-tokens", "3"], "did you mean 'paper'"),
        (["--preset", "paper", "--pruner", "zoo"], "--preset"),
        (["--conv-mode", "vicuna"], "unknown --conv-mode"),
        (["--limit", "-1"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--output", __file__], "cannot make the output folder"),
        (["--chunk-idx", "2", "--num-chunks", "2"], "--chunk-idx"),
        (["--chunk-idx", "10", "--num-chunks", "12"], "is empty"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert exit_code(lambda: run(tmp_path / "output", *extra)) == 2
    assert message in last_line(capfd)


def test_two_runs_on_one_output(
    run: Run, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    before = {name: (output / name).read_bytes() for name in FILES}
    with exclusive(output):
        assert run(output, "--arm", "none") == 2
    assert "another process is writing to" in last_line(capfd)
    assert {name: (output / name).read_bytes() for name in FILES} == before


def test_compare(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{finished}:zoo:directions=4@64", f"{finished}:none"]) == 0
    said = capsys.readouterr().out
    metrics = read(finished / "metrics.json")["arms"]["zoo:directions=4@64"]["metrics"]
    accuracy = metrics["accuracy"]
    assert f"A scores {accuracy['value']:.2f} ± {accuracy['se']:.2f}" in said
    assert f"A - B: {accuracy['value'] - 100:+.2f} ± {accuracy['se']:.2f}" in said
    wrong = 9 - round(9 * accuracy["value"] / 100)
    p = min(1.0, 2 * 0.5**wrong)
    assert f"right only in A 0, only in B {wrong}: exact McNemar p = {p:.3g}" in said
    assert "B and the unpruned model: the same answer to 9 of 9" in said


def test_compare_refuses_other_questions(
    run: Run, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "few", "--limit", "4") == 0
    cases = [
        ([f"{finished}:none", str(tmp_path / "few")], "5 are not in B, such as 4"),
        ([f"{finished}:zoo@64", str(tmp_path / "few")], "has no arm 'zoo@64'"),
        ([str(finished), str(tmp_path / "few")], "several arms"),
        ([str(tmp_path), str(tmp_path / "few")], "cannot read"),
    ]
    for words, message in cases:
        capfd.readouterr()
        assert main(["compare", *words]) == 2
        assert message in last_line(capfd)
    log = tmp_path / "few" / "answers.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert main(["compare", str(tmp_path / "few"), str(tmp_path / "few")]) == 2
    assert "cut short" in last_line(capfd)
    (tmp_path / "odd").mkdir()
    for info in (
        {"status": "done", "task": "x"},
        {"status": "done", "task": "x", "arms": {"a": {}}},
    ):
        (tmp_path / "odd" / "run.json").write_text(json.dumps(info))
        (tmp_path / "odd" / "answers.jsonl").write_text('{"arm": "b"}\n')
        assert main(["compare", str(tmp_path / "odd"), str(tmp_path / "odd")]) == 2
        assert "no files of one finished run" in last_line(capfd)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(2000, 2100) == pytest.approx(math.erfc(99 / math.sqrt(2 * 4100)), rel=0.01)


def test_the_bootstrap_agrees_with_the_clustered_error() -> None:
    draw = random.Random(0)
    clusters = [i // 3 for i in range(600)]
    shift = [draw.gauss(0.05, 0.3) for _ in range(200)]
    values = [shift[cluster] + draw.gauss(0, 0.1) for cluster in clusters]
    estimate = mean_estimate(values, clusters)
    low, high, p = paired_bootstrap(values, [0.0] * 600, clusters)
    assert low == pytest.approx(estimate.value - 1.96 * estimate.se, abs=0.1 * estimate.se)
    assert high == pytest.approx(estimate.value + 1.96 * estimate.se, abs=0.1 * estimate.se)
    normal = math.erfc(abs(estimate.value / estimate.se) / math.sqrt(2))
    assert p == pytest.approx(normal, abs=0.02)
    assert paired_bootstrap(values, values, clusters)[2] == 1.0
