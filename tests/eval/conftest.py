"""One random checkpoint and one small benchmark for all tests of the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llava import build_benchmark, build_checkpoint

from llava.eval.__main__ import main
from llava.eval.engine.batches import Plan
from llava.eval.engine.runner import Runner
from llava.eval.tasks.question_file import QuestionFile
from llava.families.spec import ModelSpec
from llava.model.loaded import LoadedModel
from llava.sampling import Sampling


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Results are promised to repeat at one thread count, so the tests fix it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model") / "llava-random")


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return build_benchmark(tmp_path_factory.mktemp("data") / "benchmark", checkpoint)


@pytest.fixture(scope="session")
def subject(checkpoint: Path) -> LoadedModel:
    return ModelSpec(str(checkpoint), device="cpu").load()


@pytest.fixture
def make_runner(subject: LoadedModel, benchmark_folder: Path) -> Callable[..., Runner]:
    benchmark = QuestionFile(benchmark_folder)

    def make(batch_size: int = 4, sampling: Sampling | None = None) -> Runner:
        plan = Plan.of(benchmark.items(), batch_size)
        sampling = sampling or Sampling(temperature=0, max_new_tokens=4)
        return Runner(subject, benchmark, plan, sampling=sampling, seed=0)

    return make


@pytest.fixture
def arguments(checkpoint: Path, benchmark_folder: Path) -> Callable[..., list[str]]:
    """Arguments of a small quickstart run that writes to `output`; later ones win."""

    def build(output: Path, *extra: str, model: Path = checkpoint) -> list[str]:
        options = {
            "--model-path": [str(model)],
            "--benchmark": [str(benchmark_folder)],
            "--image-folder": [str(benchmark_folder / "images")],
            "--output": [str(output)],
            "--methods": ["none", "random", "zoo-exact"],
            "--budgets": ["576", "64"],
            "--batch-size": ["4"],
            "--limit": ["0"],
        }
        flat = [word for flag, values in options.items() for word in (flag, *values)]
        return ["quickstart", *flat, *extra]

    return build


@pytest.fixture
def quickstart(arguments: Callable[..., list[str]]) -> Callable[..., int]:
    """Run quickstart in this process."""

    def run(output: Path, *extra: str, **kwargs: Path) -> int:
        return main(arguments(output, *extra, **kwargs))

    return run
