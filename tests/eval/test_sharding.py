"""Several processes share a run, and a process that fails is reported and costs nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llava.eval.__main__ import main
from llava.eval.engine.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("answers.jsonl", "metrics.json")

# Rank 1 fails at its second batch: by an exception, or as the kernel ends a process.
FAILING = """
import os, signal, sys
from llava.eval.__main__ import main
from llava.eval.engine.run_folder import RunFolder

if os.environ["RANK"] == "1":
    real, seen = RunFolder.append, []
    def append(self, answers, timings):
        seen.append(0)
        if len(seen) == 2:
            {failure}
        real(self, answers, timings)
    RunFolder.append = append
sys.exit(main())
"""


@pytest.fixture(scope="module")
def arguments(checkpoint: Path, benchmark_folder: Path):
    def build(output: Path) -> list[str]:
        words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny"]
        words += ["--data-root", str(benchmark_folder), "--output", str(output)]
        words += ["--batch-size", "2", "--workers", "1", "--device", "cpu"]
        return [*words, "--arm", "none", "--arm", "zoo-exact@64"]

    return build


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    assert main(arguments(output)) == 0
    return output


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def by_hand(program: list[str], folder: Path) -> list[tuple[int, str]]:
    """(exit code, output) of two ranks that are started one by one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    logs = [folder / f"rank{rank}" for rank in (0, 1)]
    started = []
    for rank, log in enumerate(logs):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as handle:
            started.append(subprocess.Popen(program, env=own, stdout=handle, stderr=handle))
    codes = [process.wait(timeout=500) for process in started]
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def test_two_processes_under_torchrun_write_the_files_of_one(
    arguments, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "llava.eval", *arguments(output)]
    done = subprocess.run(torchrun, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for name in DETERMINISTIC:
        assert (output / name).read_bytes() == (alone / name).read_bytes()
    (run,) = (output / "runs").iterdir()
    logs = sorted((run / "log").glob("answers-*.jsonl"))
    assert [log.stat().st_size > 0 for log in logs] == [True, True], "both have answered"
    assert main(arguments(output)) == 0, "one process takes up what two have done"
    assert '"reused_batches": 5' in (output / "run.json").read_text()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise RuntimeError('out of memory')", "rank 1: RuntimeError: out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "lost another process of this run"),
    ],
)
def test_a_failed_rank_is_reported_and_resumed(
    arguments, alone: Path, tmp_path: Path, failure: str, message: str
) -> None:
    output = tmp_path / "output"
    program = textwrap.dedent(FAILING).replace("{failure}", failure)
    (code, said), (other, _) = by_hand(
        [sys.executable, "-c", program, *arguments(output)], tmp_path
    )
    assert code == 2 and other != 0
    (line,) = [line for line in said.splitlines() if line.startswith("llava.eval: error")]
    assert message in line and "run the same command again" in line
    assert not (output / "metrics.json").exists()
    assert main(arguments(output)) == 0
    assert '"reused_batches": 4' in (output / "run.json").read_text(), "3 of rank 0, 1 of rank 1"
    for name in DETERMINISTIC:
        assert (output / name).read_bytes() == (alone / name).read_bytes()


def test_batches_are_dealt_once() -> None:
    numbers = [0, 2, 3, 7, 8]
    dealt = [Processes(rank, 3).deal(numbers) for rank in range(3)]
    assert sorted(n for share in dealt for n in share) == numbers
    assert dealt[0] == [0, 7]
    assert Processes().deal(numbers) == numbers
