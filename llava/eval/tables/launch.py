"""Carry out a planned run: in this process, or shared by several under torchrun."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava.command_line import CORRECTABLE, explain
from llava.eval.engine.request import ModelSpec, RunRequest
from llava.eval.engine.run import run
from llava.eval.tables.plan import DEFAULT_PROTOCOL, Job
from llava.eval.tasks.base import get_benchmark
from llava.model.checkpoint import local_checkpoint
from llava.pixels import ORIGINAL
from llava.sampling import Sampling
from llava.storage import dump_json, write_atomically


@dataclass(frozen=True)
class Launch:
    """What all runs of a table have in common, as the flags of `run`.

    `processes`: how many share each run, one per GPU; 1 runs inside this process. `data_root`: None
    for each benchmark's own default.
    """

    model_path: str
    data_root: Path | None
    output: Path
    model_base: str | None = None
    conv_mode: str | None = None
    batch_size: int = 8
    limit: int = 0
    seed: int = 0
    workers: int = 2
    device: str = "auto"
    dtype: str | None = None
    pixels: str = ORIGINAL
    processes: int = 1
    max_new_tokens: int | None = None

    def folder(self, job: Job) -> Path:
        """Return where the run of `job` puts its files."""
        return self.output / "cells" / job.folder

    def root(self, job: Job) -> Path:
        """Return where the files of the benchmark of `job` are."""
        return self.data_root or get_benchmark(job.task).default_root

    def request(self, job: Job) -> RunRequest:
        """Return the run of `job`.

        Raises:
            UserInputError: a model or data that are not here.
        """
        base = None if self.model_base is None else str(local_checkpoint(self.model_base))
        benchmark = get_benchmark(job.task)(self.root(job), job.protocol)
        benchmark.pixels = self.pixels
        return RunRequest(
            benchmark=benchmark,
            model=ModelSpec(
                str(local_checkpoint(self.model_path)),
                base,
                self.device,
                self.conv_mode,
                self.dtype,
                job.next_protocol,
            ),
            arms=job.arms,
            sampling=Sampling(0, max_new_tokens=self.max_new_tokens or benchmark.max_new_tokens),
            output=self.folder(job),
            batch_size=self.batch_size,
            limit=self.limit,
            seed=self.seed,
            workers=self.workers,
            command=shlex.join(["python", "-m", "llava.eval", *self.arguments(job)]),
        )

    def arguments(self, job: Job, arms: Path | None = None) -> list[str]:
        """Return arguments of `python -m llava.eval` that run `job`, its arms in a file or not."""
        next_protocol = None if job.next_protocol == DEFAULT_PROTOCOL else job.next_protocol
        flags = {
            "--model-path": self.model_path,
            "--task": job.task,
            "--model-base": self.model_base,
            "--conv-mode": self.conv_mode,
            "--protocol": job.protocol,
            "--dtype": self.dtype,
            "--mm-next-protocol": next_protocol,
            "--data-root": self.root(job),
            "--output": self.folder(job),
            "--batch-size": self.batch_size,
            "--limit": self.limit,
            "--seed": self.seed,
            "--workers": self.workers,
            "--device": self.device,
            "--pixels": self.pixels,
            "--max-new-tokens": self.max_new_tokens,
            "--arms": arms,
        }
        given = {flag: str(value) for flag, value in flags.items() if value is not None}
        words = [word for flag in given.items() for word in flag]
        if arms is None:
            words += [word for arm in job.arms for word in ("--arm", arm.name)]
        return ["run", *words]


def run_job(launch: Launch, job: Job) -> int:
    """Run, or finish, `job` and return an exit code: 2 with one line on stderr where it cannot."""
    if launch.processes == 1:
        try:
            return run(launch.request(job))
        except CORRECTABLE as error:
            print(f"llava.eval: error: {explain(error)}", file=sys.stderr)
            return 2
    arms = launch.folder(job) / "arms.json"
    write_atomically(arms, dump_json({arm.name: arm.to_dict() for arm in job.arms}))
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(launch.processes), "-m", "llava.eval"]
    done = subprocess.run([sys.executable, *torchrun, *launch.arguments(job, arms)])
    return done.returncode


RunJob = Callable[[Launch, Job], int]
