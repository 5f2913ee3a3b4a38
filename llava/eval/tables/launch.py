"""Carry out a planned run: in this process, or shared by several under torchrun."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava.command_line import CORRECTABLE, explain
from llava.eval.engine.request import RunRequest
from llava.eval.engine.run import run
from llava.eval.tables.plan import DEFAULT_PROTOCOL, Job
from llava.eval.tasks.base import get_benchmark
from llava.families.contract import VisionLanguageModel
from llava.families.spec import ModelSpec
from llava.pixels import ORIGINAL
from llava.sampling import Sampling
from llava.storage import dump_json, write_atomically


class SharedModel:
    """Loads models, and keeps the last one for what follows with the same."""

    def __init__(self) -> None:
        self._loaded: dict[ModelSpec, VisionLanguageModel] = {}

    def load(self, spec: ModelSpec) -> VisionLanguageModel:
        """Return the model of `spec`."""
        if spec not in self._loaded:
            self._loaded.clear()  # first, because two may not fit into memory
            self._loaded[spec] = spec.load()
        return self._loaded[spec]


@dataclass(frozen=True)
class Launch:
    """What all runs of a table have in common.

    Attributes:
        model: as the user named it.
        data_root: LLaVA's data layout; None for each benchmark's own default.
        output: folder of the table.
        batch_size, limit, seed, workers: as in `RunRequest`.
        pixels: how pictures are read.
        max_new_tokens: longest answer; by default the task's.
        processes: how many share each run, one per GPU; 1 runs inside this process.
        shared: the model of the runs inside this process.
    """

    model: ModelSpec
    data_root: Path | None
    output: Path
    batch_size: int = 8
    limit: int = 0
    seed: int = 0
    workers: int = 2
    pixels: str = ORIGINAL
    max_new_tokens: int | None = None
    processes: int = 1
    shared: SharedModel = field(default_factory=SharedModel, compare=False)

    def folder(self, job: Job) -> Path:
        """Return where the run of `job` puts its files."""
        return self.output / "cells" / job.folder

    def request(self, job: Job) -> RunRequest:
        """Return the run of `job`.

        Raises:
            UserInputError: an unknown benchmark or prompt protocol.
        """
        cls = get_benchmark(job.task)
        benchmark = cls(self.data_root or cls.default_root, job.protocol)
        benchmark.pixels = self.pixels
        request = RunRequest(
            benchmark=benchmark,
            model=replace(self.model, mm_next_protocol=job.next_protocol),
            arms=job.arms,
            sampling=Sampling(0, max_new_tokens=self.max_new_tokens or benchmark.max_new_tokens),
            output=self.folder(job),
            batch_size=self.batch_size,
            limit=self.limit,
            seed=self.seed,
            workers=self.workers,
        )
        return replace(request, command=shlex.join(["python", "-m", *arguments(request)]))


def arguments(request: RunRequest, arms: Path | None = None) -> list[str]:
    """Return the program and the flags that make `request`, its arms in a file or not."""
    model, benchmark = request.model, request.benchmark
    native = model.mm_next_protocol == DEFAULT_PROTOCOL
    flags = {
        "--model-path": model.path,
        "--task": benchmark.name,
        "--model-base": model.base,
        "--conv-mode": model.conv_mode,
        "--protocol": benchmark.protocol,
        "--dtype": model.dtype,
        "--mm-next-protocol": None if native else model.mm_next_protocol,
        "--data-root": benchmark.root,
        "--output": request.output,
        "--batch-size": request.batch_size,
        "--limit": request.limit,
        "--seed": request.seed,
        "--workers": request.workers,
        "--device": model.device,
        "--pixels": benchmark.pixels,
        "--max-new-tokens": request.sampling.max_new_tokens,
        "--arms": arms,
    }
    words = [w for flag, value in flags.items() if value is not None for w in (flag, str(value))]
    if arms is None:
        words += [word for arm in request.arms for word in ("--arm", arm.name)]
    return ["llava.eval", "run", *words]


def run_job(launch: Launch, job: Job) -> int:
    """Run, or finish, `job` and return an exit code: 2 with one line on stderr where it cannot."""
    try:
        request = launch.request(job)
        if launch.processes == 1:
            located = replace(request, model=request.model.located())
            return run(located, load=launch.shared.load)
    except CORRECTABLE as error:
        print(f"llava.eval: error: {explain(error)}", file=sys.stderr)
        return 2
    arms = request.output / "arms.json"
    write_atomically(arms, dump_json({arm.name: arm.to_dict() for arm in job.arms}))
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(launch.processes), "-m"]
    return subprocess.run([sys.executable, *torchrun, *arguments(request, arms)]).returncode


RunJob = Callable[[Launch, Job], int]
