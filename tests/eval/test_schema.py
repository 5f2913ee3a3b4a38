"""Result files: their keys are those of the types and of the document, and schema 1 is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.__main__ import main
from llava.eval.engine import schema
from llava.eval.engine.request import read_arms
from llava.eval.engine.schema import ResultError, read_info, read_lines, read_metrics, read_result
from llava.pruning import PruningConfig

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).parent / "schema_1"
TYPES = (
    schema.ArmSetting,
    schema.Figure,
    schema.Difference,
    schema.LayerTokens,
    schema.ArmMetrics,
    schema.Metrics,
    schema.RunInfo,
    schema.Answer,
    schema.Timing,
    schema.Result,
    schema.ResultRow,
)


def check(content: dict, kind: type) -> None:
    """Every key of a file has its type, and every required key is there."""
    assert content.keys() <= kind.__annotations__.keys(), content.keys()
    assert content.keys() >= kind.__required_keys__, kind.__required_keys__ - content.keys()


@pytest.fixture(scope="module")
def finished(checkpoint: Path, benchmark_folder: Path, tmp_path_factory) -> Path:
    """One quickstart, with an arm that cannot run."""
    output = tmp_path_factory.mktemp("finished")
    words = ["quickstart", "--model-path", str(checkpoint), "--benchmark", str(benchmark_folder)]
    words += ["--methods", "grid", "pool", "--budgets", "31", "--limit", "3"]
    assert main([*words, "--output", str(output), "--save-result", str(output / "r.json")]) == 0
    return output


def test_files_have_the_keys_of_their_types(finished: Path) -> None:
    metrics, info = read_metrics(finished), read_info(finished)
    check(metrics, schema.Metrics)
    check(info, schema.RunInfo)
    assert metrics["schema_version"] == info["schema_version"] == schema.SCHEMA_VERSION
    for arms, kind in ((metrics["arms"], schema.ArmMetrics), (info["arms"], schema.ArmSetting)):
        assert list(arms) == ["none", "grid@31", "pool@31", *list(arms)[3:]]
        for arm in arms.values():
            check(arm, kind)
    assert "unavailable" in metrics["arms"]["pool@31"]
    for figure in metrics["arms"]["grid@31"]["metrics"].values():
        check(figure, schema.Figure)
    check(metrics["arms"]["grid@31"]["difference"], schema.Difference)
    for name, kind in (("answers", schema.Answer), ("timings", schema.Timing)):
        for line in read_lines(finished / f"{name}.jsonl"):
            check(line, kind)
    result = read_result(finished / "r.json")
    check(result, schema.Result)
    measured = [row for row in result["rows"] if row["unavailable"] is None]
    for row in measured:
        check(row, schema.ResultRow)
    assert len(measured) == len(result["rows"]) - 1, "pool cannot keep 31"


def test_the_document_names_every_key() -> None:
    text = (ROOT / "docs" / "results_schema.md").read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    named = set(re.findall(r"`([^`]+)`", prose))
    keys = {key for kind in TYPES for key in kind.__annotations__}
    assert keys - named == set()


@pytest.mark.parametrize("kind", ["run", "quickstart"])
def test_schema_1_is_read_as_schema_2(kind: str) -> None:
    metrics, info = read_metrics(OLD / kind), read_info(OLD / kind)
    assert (metrics["task"], metrics["protocol"], metrics["headline"]) == (
        "llava-tiny",
        "llava",
        "accuracy",
    )
    for arms in (metrics["arms"], info["arms"]):
        for arm in arms.values():
            PruningConfig.read(arm["pruning"])  # a setting that exists
            assert arm.keys() >= schema.ArmSetting.__required_keys__
    for name, arm in metrics["arms"].items():
        lines = [line for line in read_lines(OLD / kind / "answers.jsonl") if line["arm"] == name]
        assert arm["answered"] == len(lines)
        if lines:
            right = 100 * sum(line["score"] for line in lines) / len(lines)
            assert arm["metrics"]["accuracy"]["value"] == pytest.approx(right)
            assert arm["metrics"]["accuracy"]["n"] == len(lines)


def test_tokens_of_older_files_are_told_apart(finished: Path, tmp_path: Path) -> None:
    """There `tokens_mean` said what enters, also of arms that drop tokens between layers."""
    metrics = json.loads((finished / "metrics.json").read_text("utf-8"))
    grid, none = metrics["arms"]["grid@31"], metrics["arms"]["none"]
    for arm in (grid, none):
        del arm["tokens_in"]
    within = {"tokens_in": 576.0, "tokens_last": 24.0, "tokens_mean": 300.0}
    grid |= {"tokens_mean": 576.0, "between_layers": within | {"tokens_per_layer": [576.0, 24.0]}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    arms = read_metrics(tmp_path)["arms"]
    assert (arms["grid@31"]["tokens_in"], arms["grid@31"]["tokens_mean"]) == (576.0, 300.0)
    assert arms["none"]["tokens_in"] == arms["none"]["tokens_mean"] == none["tokens_mean"]
    assert read_metrics(OLD / "run")["arms"]["pool@31"]["tokens_in"] is None


def test_budgets_of_schema_1_are_told_apart_by_their_type() -> None:
    arms = read_info(OLD / "run")["arms"]
    assert arms["none"]["pruning"] is None
    assert arms["random@0.1"]["pruning"] == {"method": "random", "keep_ratio": 0.1}
    assert arms["zoo@1.0"]["pruning"] == {"method": "zoo", "keep_ratio": 1.0}
    setting = {"method": "zoo", "keep_tokens": 32, "allocation": "global"}
    assert arms["zoo:allocation=global@32"]["pruning"] == setting
    assert "no r x c = 31" in arms["pool@31"]["unavailable"]
    shown = {name: arm["image"] for name, arm in read_metrics(OLD / "quickstart")["arms"].items()}
    assert shown == {
        "none": "own",
        "zoo@64": "own",
        "shuffled-image": "other",
        "no-image": "absent",
    }


def test_compare_takes_folders_of_both_commands_and_schemas(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, arm in (
        (finished, "grid@31"),
        (OLD / "quickstart", "zoo@64"),
        (OLD / "run", "random@0.1"),
    ):
        figure = read_metrics(folder)["arms"][arm]["metrics"]["accuracy"]
        capsys.readouterr()
        assert main(["compare", f"{folder}:{arm}", f"{folder}:none"]) == 0
        said = capsys.readouterr().out
        assert f"A scores {figure['value']:.2f} ± {figure['se']:.2f}" in said
        assert "B and the unpruned model: the same answer to" in said


def test_the_tracked_result_is_read() -> None:
    result = read_result(ROOT / "playground" / "results" / "llava-tiny.json")
    assert result["rows"][0]["arm"] == "none"


def test_arms_of_a_run_can_be_given_to_another(
    finished: Path, tmp_path: Path, run_arms: Callable[..., dict]
) -> None:
    arms = read_info(finished)["arms"]
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({name: arms[name] for name in ("grid@31", "no-image")}), "utf-8")
    assert run_arms(tmp_path / "out", "--arms", str(file)) == {
        name: arms[name] for name in ("grid@31", "no-image")
    }


@pytest.fixture
def run_arms(checkpoint: Path, benchmark_folder: Path) -> Callable[..., dict]:
    def run(output: Path, *extra: str) -> dict:
        words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny", "--limit", "2"]
        words += ["--data-root", str(benchmark_folder), "--workers", "0", "--device", "cpu"]
        assert main([*words, "--output", str(output), *extra]) == 0
        return read_info(output)["arms"]

    return run


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "is not a result file"),
        ('{"a": 3}', "arm 'a': write an object with the key `pruning`"),
        ('{"a": {}}', "arm 'a': write an object"),
        ('{"a": {"pruning": null, "picture": "own"}}', "arm 'a': write an object"),
        ('{"a": {"pruning": {"method": "zoom", "keep_tokens": 3}}}', "did you mean 'zoo'"),
        ('{"a": {"pruning": {"method": "zoo", "keep_ratio": "1"}}}', "keep_ratio must be a share"),
    ],
)
def test_files_of_arms_that_cannot_be_read(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "arms.json"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_arms(file)
    assert isinstance(caught.value, ResultError) or "arms.json" in str(caught.value)
