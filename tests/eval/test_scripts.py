"""Shell scripts: they parse, and their arguments become the command they should."""

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from llava.eval.tables import list_tables

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").rglob("*.sh"))
EVAL = [path for path in SCRIPTS if path.parent.name == "eval"]
TABLES = [path for path in SCRIPTS if path.parent.name == "tables" and path.stem != "common"]
TASKS = {
    **{name: name for name in ("gqa", "vqav2", "textvqa", "pope", "mme", "mmbench", "seed")},
    **{name: name for name in ("mmmu", "vizwiz", "mmvet")},
    **{"sqa": "scienceqa", "mmbench_cn": "mmbench-cn", "llavabench": "llava-bench"},
}


def run(
    script: Path, *words: str, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    names = ("PRUNER", "KEEP_TOKENS", "PRUNER_OPTIONS", "MODEL", "DATA_ROOT", "OUTPUT", "DRY_RUN")
    clean = {k: v for k, v in os.environ.items() if k not in (*names, "CUDA_VISIBLE_DEVICES")}
    clean |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", str(ROOT / script), *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=timeout)


def command_of(script: Path, *words: str, **variables: str) -> list[str]:
    """The words that the script would run, without the interpreter."""
    done = run(script, *words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)[1:]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_parses(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_both_versions_have_a_script_for_every_benchmark() -> None:
    assert {(path.parts[1], path.stem) for path in EVAL} == {
        (version, name) for version in ("v1_5", "v1_6") for name in TASKS
    }


def test_every_table_has_its_script() -> None:
    assert {path.stem for path in TABLES} == set(list_tables())


@pytest.mark.parametrize("script", EVAL, ids=str)
def test_a_benchmark_script_names_its_task_and_passes_the_setting_on(script: Path) -> None:
    words = command_of(script, "zoo", "64", "--limit", "3", PRUNER_OPTIONS="fusion=sum step=0.1")
    assert words[:3] == ["-m", "llava.eval", "run"]
    pairs = list(pairwise(words))
    for pair in (
        ("--task", TASKS[script.stem]),
        ("--pruner", "zoo"),
        ("--keep-tokens", "64"),
        ("--pruner-option", "fusion=sum"),
        ("--pruner-option", "step=0.1"),
        ("--limit", "3"),
        ("--conv-mode", "vicuna_v1"),
        ("--data-root", "playground/data/eval"),
    ):
        assert pair in pairs
    model = "v1.5-7b" if script.parts[1] == "v1_5" else "v1.6-vicuna-7b"
    assert ("--model-path", f"liuhaotian/llava-{model}") in pairs


def test_the_environment_sets_what_arguments_do_not() -> None:
    words = command_of(
        Path("scripts/v1_5/eval/pope.sh"),
        PRUNER="divprune",
        KEEP_TOKENS="128",
        MODEL="my/llava",
        DATA_ROOT="/data",
        CONV_MODE="",
    )
    pairs = list(pairwise(words))
    assert {("--pruner", "divprune"), ("--keep-tokens", "128"), ("--data-root", "/data")} < {*pairs}
    assert ("--model-path", "my/llava") in pairs and "--conv-mode" not in words


def test_the_environment_names_what_is_dropped_between_layers() -> None:
    script = Path("scripts/v1_5/eval/pope.sh")
    within = {"DECODER_PRUNER": "fastv", "DECODER_KEEP_TOKENS": "64", "DECODER_OPTIONS": "k=3"}
    words = command_of(script, "zoo", "192", **within)
    pairs = {*pairwise(words)}
    assert {("--pruner", "zoo"), ("--keep-tokens", "192"), ("--decoder-pruner", "fastv")} < pairs
    assert {("--decoder-keep-tokens", "64"), ("--decoder-option", "k=3")} < pairs
    assert words[words.index("--output") + 1].endswith("/zoo-192+fastv-64")
    alone = command_of(script, DECODER_PRUNER="pyramiddrop")
    assert ("--pruner", "none") in {*pairwise(alone)}
    assert alone[alone.index("--output") + 1].endswith("/none+pyramiddrop")
    assert not any("decoder" in word for word in command_of(script))


def test_several_gpus_share_a_run() -> None:
    words = command_of(Path("scripts/v1_5/eval/gqa.sh"), CUDA_VISIBLE_DEVICES="0,1,3")
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    assert words[5:8] == ["-m", "llava.eval", "run"]
    assert "--keep-tokens" not in words


@pytest.mark.parametrize(
    ("script", "protocol"),
    [
        ("v1_5/eval/textvqa.sh", "ocr"),
        ("v1_6/eval/textvqa.sh", "no-ocr"),
        ("v1_5/eval/vqav2.sh", "test-dev"),
        ("v1_5/eval/mmbench.sh", "single"),
    ],
)
def test_protocols_are_named_and_can_be_changed(script: str, protocol: str) -> None:
    words = command_of(Path("scripts") / script)
    assert words[words.index("--protocol") + 1] == protocol
    words = command_of(Path("scripts") / script, PROTOCOL="other")
    assert words[words.index("--protocol") + 1] == "other"


@pytest.mark.parametrize("words", [["zoo"], ["zoo", "0"], ["zoo", "many"], ["zoo", "64", "gqa"]])
def test_a_wrong_setting_is_refused_before_anything_runs(words: list[str]) -> None:
    done = run(Path("scripts/v1_5/eval/pope.sh"), *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stdout == ""


def test_help_is_the_head_of_the_script() -> None:
    done = run(Path("scripts/v1_6/eval/mme.sh"), "--help")
    assert done.returncode == 0 and "bash scripts/v1_6/eval/mme.sh" in done.stdout


@pytest.mark.parametrize("script", TABLES, ids=str)
def test_a_table_script_names_its_table_and_passes_arguments_on(script: Path) -> None:
    variables = {"MODEL": "my/llava", "DATA_ROOT": "/data", "OUTPUT": "/out", "DRY_RUN": "1"}
    done = run(script, "--demo", PYTHON="echo", CUDA_VISIBLE_DEVICES="2,3", **variables)
    assert done.stdout.split() == [
        *("-m", "llava.eval", "paper-table", script.stem, "--processes", "2"),
        *("--model-path", "my/llava", "--data-root", "/data", "--output", "/out"),
        *("--dry-run", "--demo"),
    ]


def test_a_table_script_prints_the_runs_it_needs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(Path("scripts/tables/ablation_fusion.sh"), "--dry-run", "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ablation") and not out.exists()
