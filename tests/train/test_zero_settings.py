"""Settings of DeepSpeed that cannot be used are one line, and launchers keep what they set."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava.train import launch, zero
from llava.train.arguments import parse_arguments
from llava.utils import UserInputError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables of this test alone, none of them a launcher's."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    own = {name: value for name, value in own.items() if name not in launch._RANKS}
    monkeypatch.setattr(os, "environ", own)
    return own


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(UserInputError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_package_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tmp_path: Path
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    words = f"""--model_name_or_path base --data_path data.json --use_cpu True
        --output_dir {tmp_path} --deepspeed scripts/zero2.json"""
    told = refusal(lambda: parse_arguments(words.split()))
    assert "needs the package deepspeed" in told and "pip install deepspeed" in told
    assert not set(LAUNCHED) & set(environment) and "DS_ACCELERATOR" not in environment


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not JSON ("),
        ("zero_optimization: 2", "is not JSON ("),
        ("\xff", "is not JSON ("),
        ("[]", "holds no settings of DeepSpeed"),
        ('{"zero_optimization": 2}', "holds no settings of DeepSpeed"),
        ('{"zero_optimization": {"stage": 4}}', "a stage from 0 to 3"),
        ('{"zero_optimization": {"stage": "auto"}}', "a stage from 0 to 3"),
        ('{"zero_optimization": {"stage": [2]}}', "a stage from 0 to 3"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_bytes(text.encode("latin-1"))
    told = refusal(lambda: zero.read_deepspeed(str(file)))
    assert fault in told and f"--deepspeed {file}" in told and "scripts/zero2.json" in told


@pytest.mark.parametrize("name", ["missing.json", "", "missing/zero.json"])
def test_a_file_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    told = refusal(lambda: zero.read_deepspeed(str(tmp_path / name)))
    assert told.startswith(f"cannot read --deepspeed {tmp_path / name} (")


def test_settings_are_read_in_every_form(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    for given in (settings, f" {json.dumps(settings)}", str(tmp_path / "zero.json")):
        assert zero.read_deepspeed(given) == settings
    assert zero.read_deepspeed("{}") == {}


def test_what_contradicts_the_arguments_is_named() -> None:
    mismatches = ["- ds train_batch_size=3 vs hf 8", "- ds gradient_clipping=2 vs hf 1"]
    training = SimpleNamespace(
        deepspeed="zero.json", hf_deepspeed_config=SimpleNamespace(mismatches=mismatches)
    )
    told = refusal(lambda: zero.check_agreement(training))
    assert "train_batch_size=3 vs hf 8; ds gradient_clipping=2 vs hf 1" in told
    assert told.startswith("--deepspeed zero.json") and "'auto'" in told
    training.hf_deepspeed_config.mismatches = []
    zero.check_agreement(training)
    zero.check_agreement(SimpleNamespace(deepspeed=None))


@pytest.fixture
def forget_deepspeed() -> Iterator[None]:
    """Leave no settings and no group of processes to later tests."""
    yield
    unset_hf_deepspeed_config()
    PartialState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.deepspeed
@pytest.mark.usefixtures("forget_deepspeed")
@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "and the arguments differ"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "many"}}, "DeepSpeed refuses zero"),
        ({"zero_optimization": {"stage": 2, "no_such_setting": 1}}, "DeepSpeed refuses zero"),
    ],
)
def test_deepspeed_and_the_arguments_must_agree(
    settings: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    whole = json.loads(Path("scripts/zero2.json").read_text()) | settings
    (tmp_path / "zero.json").write_text(json.dumps(whole))
    words = f"""--model_name_or_path base --data_path data.json --use_cpu True
        --output_dir {tmp_path} --per_device_train_batch_size 2
        --deepspeed {tmp_path / "zero.json"}"""
    assert fault in refusal(lambda: parse_arguments(words.split()))


def test_a_process_without_a_launcher_is_a_run_of_one(environment: dict[str, str]) -> None:
    launch.join_alone()
    assert {name: environment[name] for name in LAUNCHED[:5]} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 1024 <= int(environment["MASTER_PORT"]) < 2**16


@pytest.mark.parametrize(
    "name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
)
def test_what_a_launcher_set_stays(name: str, environment: dict[str, str]) -> None:
    environment.update({name: "1", "WORLD_SIZE": "2"})
    before = dict(environment)
    launch.join_alone()
    assert environment == before


@pytest.mark.parametrize(
    ("processes", "rank", "first_says", "waits"),
    [
        ("", "0", False, False),
        ("1", "0", False, False),
        ("2", "0", True, False),
        ("2", "0", False, True),
        ("2", "1", True, True),
    ],
)
def test_a_failed_process_waits_where_another_one_reports(
    processes: str,
    rank: str,
    first_says: bool,
    waits: bool,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    environment.update(WORLD_SIZE=processes, LOCAL_RANK=rank)
    launch.wait_to_be_ended(first_says)
    assert bool(slept) == waits


def test_without_deepspeed_there_is_no_stage_and_nothing_is_gathered() -> None:
    assert zero.zero_stage() == 0
    with zero.gathered([]) as whole:
        assert whole is None
