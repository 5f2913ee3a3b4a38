"""SIGKILL at any moment: run the same command again, and its files are byte for byte the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import dying_run
import pytest

DETERMINISTIC = ("answers.jsonl", "metrics.json")


@pytest.fixture(scope="module")
def command(checkpoint: Path, benchmark_folder: Path) -> Callable[..., list[str]]:
    def build(output: Path, *extra: str) -> list[str]:
        words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny"]
        words += ["--data-root", str(benchmark_folder), "--output", str(output)]
        words += ["--batch-size", "4", "--workers", "0", "--device", "cpu"]
        return [*words, "--arm", "none", "--arm", "random@64", "--arm", "zoo-exact@64", *extra]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, int]:
    """An uninterrupted run: its output, its seconds, and how many bytes it wrote."""
    output = tmp_path_factory.mktemp("whole") / "output"
    log = output.parent / "log"
    code, seconds = dying_run.run(command(output), log)
    assert code == 0, log.read_text()
    (folder,) = (output / "runs").iterdir()
    files = [*folder.glob("*.json*"), *(folder / "log").glob("*.jsonl")]
    return output, seconds, sum(file.stat().st_size for file in files)


def check(command, whole: tuple[Path, float, int], folder: Path, **kill: float) -> None:
    output = folder / "output"
    code, _ = dying_run.run(command(output), folder / "log", **kill)
    assert code in (0, -9), (folder / "log").read_text()
    if code == -9 and output.exists():
        for name in DETERMINISTIC:
            published = output / name
            complete = published.exists() and published.read_bytes()
            assert complete in (False, (whole[0] / name).read_bytes())
    code, _ = dying_run.run(command(output), folder / "log")
    assert code == 0, (folder / "log").read_text()
    for name in DETERMINISTIC:
        assert (output / name).read_bytes() == (whole[0] / name).read_bytes()
    assert json.loads((output / "run.json").read_text())["status"] == "done"
    (run,) = (output / "runs").iterdir()
    assert len((run / "log" / "timings-0.jsonl").read_text().splitlines()) == 9


def moments(whole: tuple[Path, float, int], seed: int, writes: int, times: int) -> list[dict]:
    """Random moments: in the middle of writing, and on the clock."""
    draw = random.Random(seed)
    _, seconds, size = whole
    chosen = [{"after_bytes": draw.randrange(size)} for _ in range(writes)]
    return chosen + [{"after": draw.uniform(0, seconds)} for _ in range(times)]


def test_killed_at_a_few_moments(command, whole, tmp_path: Path) -> None:
    for number, moment in enumerate(moments(whole, seed=0, writes=3, times=1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(command, whole, folder, **moment)


@pytest.mark.slow
def test_killed_at_twenty_moments(command, whole, tmp_path: Path) -> None:
    for number, moment in enumerate(moments(whole, seed=1, writes=12, times=8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(command, whole, folder, **moment)


def test_a_run_killed_again_and_again_comes_to_its_end(command, whole, tmp_path: Path) -> None:
    """Each process dies a little further on, in one output folder."""
    output, codes = tmp_path / "output", []
    while not codes or codes[-1] == -9:
        size = 1500 * (len(codes) + 1)
        code, _ = dying_run.run(command(output), tmp_path / "log", after_bytes=size)
        codes.append(code)
    assert codes[-1] == 0 and len(codes) > 2, (tmp_path / "log").read_text()
    for name in DETERMINISTIC:
        assert (output / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_changed_setting_reuses_nothing(command, whole, tmp_path: Path) -> None:
    """A run that was killed leaves its answers to itself."""
    output = tmp_path / "output"
    half = whole[2] // 2
    assert dying_run.run(command(output), tmp_path / "log", after_bytes=half)[0] == -9
    assert dying_run.run(command(output, "--seed", "1"), tmp_path / "log")[0] == 0
    info = json.loads((output / "run.json").read_text())
    assert info["reused_batches"] == 0
    assert len(list((output / "runs").iterdir())) == 2
    other = {json.loads(line)["answer_id"] for line in (output / "answers.jsonl").open()}
    own = {json.loads(line)["answer_id"] for line in (whole[0] / "answers.jsonl").open()}
    assert not other & own
