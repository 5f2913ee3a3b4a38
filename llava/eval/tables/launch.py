"""Handing a planned run to `python -m llava.eval run`, in this process or under torchrun.

Rows travel as words of `--arm`, which say all of a setting (`llava.eval.arm_words`), so a run in
this process, one under torchrun and one that a user copies from `--dry-run` are the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava.eval.tables.plan import DEFAULT_PROTOCOL, Job
from llava.pixels import ORIGINAL


@dataclass(frozen=True)
class Launch:
    """What all runs of a table have in common.

    `processes`: how many share each run, one per GPU; 1 runs inside this process. `extra` goes to
    the `run` command as it is.
    """

    model_path: str
    data_root: Path
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
    extra: tuple[str, ...] = ()

    def folder(self, job: Job) -> Path:
        """Where the run of `job` puts its files."""
        return self.output / "cells" / job.folder

    def arguments(self, job: Job) -> list[str]:
        """Arguments of `python -m llava.eval` that run `job`."""
        words = ["run", "--model-path", self.model_path, "--task", job.task]
        optional = {
            "--model-base": self.model_base,
            "--conv-mode": self.conv_mode,
            "--protocol": job.protocol,
            "--dtype": self.dtype,
            "--mm-next-protocol": None
            if job.next_protocol == DEFAULT_PROTOCOL
            else job.next_protocol,
        }
        for flag, value in optional.items():
            words += [] if value is None else [flag, value]
        words += ["--data-root", str(self.data_root), "--output", str(self.folder(job))]
        words += ["--batch-size", str(self.batch_size), "--limit", str(self.limit)]
        words += ["--seed", str(self.seed), "--workers", str(self.workers)]
        words += ["--device", self.device, "--pixels", self.pixels]
        for setting in job.settings:
            words += ["--arm", setting.word]
        return [*words, *self.extra]


def run_job(launch: Launch, job: Job) -> int:
    """Run, or finish, `job`; the exit code of the `run` command."""
    words = launch.arguments(job)
    if launch.processes == 1:
        from llava.eval.__main__ import main  # which knows this module's command too

        return main(words)
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(launch.processes)]
    done = subprocess.run([sys.executable, *torchrun, "-m", "llava.eval", *words])
    return done.returncode


RunJob = Callable[[Launch, Job], int]
