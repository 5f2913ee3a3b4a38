"""ZeRO-2 and ZeRO-3 with two processes on the CPU train like one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from several_processes import ROOT, Together, differences, losses

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
