"""Two processes train like one with batches of twice the size; an error of one ends both."""

from collections.abc import Callable
from pathlib import Path

import pytest
from several_processes import Together, differences, losses

RUNS = {
    "full": "",
    "accumulated": "--gradient_accumulation_steps 2 --gradient_checkpointing true",
    "modality": "--group_by_modality_length true",
    "budget": "--pruner zoo --keep-tokens-range 2 12",
    "tower": "--unfreeze_mm_vision_tower true --gradient_checkpointing true",
    "projector": "--tune_mm_mlp_adapter true",
    "lora": "--lora_enable true --lora_r 4 --lora_dropout 0",
    "bad": "--data_path {small}/bad.json --max_steps 1",
}
GOOD = [name for name in RUNS if name != "bad"]
# float32; sums of gradients are of another order
LOSS, WEIGHT = 1e-4, 1e-4


@pytest.fixture(scope="module")
def pair(together: Callable[..., Together], small: Path) -> Together:
    return together({name: extra.format(small=small) for name, extra in RUNS.items()})


@pytest.mark.parametrize("name", GOOD)
def test_losses_and_weights_are_those_of_one_process(
    name: str, pair: Together, alone: Callable[[str], Path]
) -> None:
    assert len(pair.reports(name)) == 2, pair.errors[-3000:]
    single, double = alone(RUNS[name]), pair.folder / name
    assert len(losses(single)) == 4
    assert losses(double) == pytest.approx(losses(single), abs=LOSS, rel=0)
    assert differences(single, double) < WEIGHT


@pytest.mark.parametrize("name", GOOD)
def test_processes_hold_the_same_weights_in_the_end(name: str, pair: Together) -> None:
    first, second = pair.reports(name)
    assert first["digests"] == second["digests"]
    assert first["processes"] == 2 and first["engine"] == "DistributedDataParallel"


def test_only_the_first_process_writes(pair: Together) -> None:
    for name in GOOD:
        first, second = pair.reports(name)
        assert any(file.endswith(".safetensors") for file in first["written"])
        assert second["written"] == []


def test_one_process_may_see_images_where_the_other_sees_text(pair: Together) -> None:
    first, second = pair.reports("full")
    assert {*zip(first["images"], second["images"], strict=True)} >= {(True, False)}


def test_an_error_of_one_process_is_one_line_and_ends_both(pair: Together) -> None:
    assert pair.code != 0
    lines = [line for line in pair.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "s0" in lines[0] and "missing.png" in lines[0]
    assert "exitcode  : 2" in pair.errors
    assert not (pair.folder / "bad/model.safetensors").exists()
    of_ours = pair.errors.split("failed (exitcode: 2)")[0]
    assert "Traceback" not in of_ours
