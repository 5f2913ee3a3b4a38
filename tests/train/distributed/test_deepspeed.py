"""ZeRO-2 and ZeRO-3 with two processes on the CPU train like one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from several_processes import ROOT, Together, differences, losses

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model

pytestmark = pytest.mark.deepspeed

RUNS = {
    "full": "",
    "prune": "--pruner zoo --keep-tokens 4",
    "projector": "--tune_mm_mlp_adapter true",
    "lora": "--lora_enable true --lora_r 4 --lora_dropout 0",
}
LOSS, WEIGHT = 1e-4, 1e-4


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def pair(request: pytest.FixtureRequest, together: Callable[..., Together]) -> Together:
    config = f"--deepspeed {ROOT}/scripts/{request.param}.json"
    return together({name: f"{extra} {config}" for name, extra in RUNS.items()})


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_one_process(
    name: str, pair: Together, alone: Callable[[str], Path]
) -> None:
    reports = pair.reports(name)
    assert len(reports) == 2, pair.errors[-3000:]
    assert [report["engine"] for report in reports] == ["DeepSpeedEngine"] * 2
    single, double = alone(RUNS[name]), pair.folder / name
    assert losses(double) == pytest.approx(losses(single), abs=LOSS, rel=0)
    assert differences(single, double) < WEIGHT


def test_what_is_saved_loads_and_answers_like_the_run_of_one_process(
    pair: Together, alone: Callable[[str], Path], small: Path
) -> None:
    ids, pixels = torch.tensor([[1, IMAGE_TOKEN_INDEX, 300, 301]]), torch.ones(1, 3, 56, 56)
    for name, base in (("full", None), ("lora", str(small / "model"))):
        found = []
        for folder in (alone(RUNS[name]), pair.folder / name):
            _, model, _, _ = load_pretrained_model(str(folder), base, device="cpu")
            with torch.no_grad():
                found.append(model(ids, images=pixels).logits)
        torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_run_goes_on_from_its_checkpoint(config: str, together: Callable[..., Together]) -> None:
    config = f"--deepspeed {ROOT}/scripts/{config}.json --lr_scheduler_type constant"
    words = f"{config} --pruner zoo --keep-tokens-range 2 9"
    whole = together({"run": words})
    saving = f"{words} --save_strategy steps --save_steps 2 --max_steps"
    stopped = together({"run": f"{saving} 2"})
    assert (stopped.folder / "run/checkpoint-2").is_dir(), stopped.errors[-3000:]
    again = together({"run": f"{saving} 4"}, folder=stopped.folder)
    assert again.code == 0, again.errors[-3000:]
    assert [len(report["names"]) for report in again.reports("run")] == [2, 2]
    assert losses(again.folder / "run") == pytest.approx(losses(whole.folder / "run"), rel=1e-5)


@pytest.mark.parametrize("launcher", ["none", "deepspeed"])
def test_runs_start_without_a_launcher_and_with_deepspeeds(
    launcher: str, together: Callable[..., Together]
) -> None:
    run = together({"run": f"--deepspeed {ROOT}/scripts/zero2.json"}, launcher=launcher)
    assert run.code == 0, run.errors[-3000:]
    assert run.reports("run")[0]["engine"] == "DeepSpeedEngine"
    assert len(losses(run.folder / "run")) == 4


def test_scores_follow_the_weights_that_an_optimiser_wrote(
    together: Callable[..., Together], alone: Callable[[str], Path]
) -> None:
    """ZeRO writes them through `.data`, so a stale cache would choose other tokens."""
    words = "--pruner zoo --keep-tokens 2 --learning_rate 0.05"
    run = together({"run": f"{words} --deepspeed {ROOT}/scripts/zero2.json"})
    assert losses(run.folder / "run") == pytest.approx(losses(alone(words)), abs=1e-3)
