"""Carrying out a run: answer what is missing, alone or with others, and hand on the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import provenance
from llava.eval.arms import Arm, without_impossible
from llava.eval.plan import Plan
from llava.eval.progress import answer_batches
from llava.eval.records import failed_items
from llava.eval.results import SCHEMA_VERSION, Record, RunFolder
from llava.eval.runner import Runner
from llava.eval.sharding import Processes
from llava.eval.summary import settings
from llava.eval.tasks.base import Benchmark
from llava.model.loaded import LoadedModel, load_model
from llava.sampling import Sampling
from llava.storage import exclusive
from llava.utils import UserInputError


@dataclass(frozen=True)
class Model:
    """A checkpoint and how it is loaded and prompted; `loading` as in `load_model`."""

    path: str
    base: str | None
    device: str
    template: str
    loading: Mapping[str, Any] = field(default_factory=dict)

    def load(self, group: Processes) -> LoadedModel:
        """The model, on this process's device."""
        device = group.device(self.device)
        return load_model(
            self.path, device, base=self.base, conv_mode=self.template, **self.loading
        )


@dataclass(frozen=True)
class Job:
    """One run. `identity` holds the `run_key`; `output` gets a folder `runs/<run key>`."""

    model: Model
    benchmark: Benchmark
    plan: Plan
    arms: Sequence[Arm]
    sampling: Sampling
    seed: int
    workers: int
    output: Path
    identity: Mapping[str, Any]
    command: str

    def runner(self, subject: LoadedModel) -> Runner:
        """The loop over this job."""
        return Runner(
            subject,
            self.benchmark,
            self.plan,
            sampling=self.sampling,
            seed=self.seed,
            run_key=self.identity["run_key"],
            workers=self.workers,
        )

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.output / "runs" / self.identity["run_key"][:16]


Finish = Callable[[RunFolder, Sequence[Arm], list[Record]], None]


def execute(
    job: Job, group: Processes, finish: Finish, begin: Callable[[], None] = lambda: None
) -> int:
    """Answer what no log holds yet; then `finish(folder, arms, answers)` in process 0.

    `begin()` is called there once the output is this run's alone.

    Returns 1 if some items could not be asked, because an image of theirs cannot be read, else 0.

    Raises:
        UserInputError: another run on the same output, a model that cannot be loaded, no arm that
            can prune as asked, a disk that is full.
    """
    started = time.monotonic()
    ready: list[tuple[Runner, tuple[Arm, ...], RunFolder]] = []
    with ExitStack() as stack:

        def take_output() -> None:
            stack.enter_context(exclusive(job.output))
            begin()

        group.agree(take_output)

        def prepare() -> None:
            runner = job.runner(job.model.load(group))
            arms = possible_arms(runner, job.arms)
            running = sum(arm.unavailable is None for arm in arms)
            sizes = [running * len(batch) for batch in job.plan.batches]
            folder = stack.enter_context(closing(RunFolder(job.folder, sizes, group.rank)))
            ready.append((runner, arms, folder))

        group.all_do(prepare)
        runner, arms, folder = ready[0]
        left = group.agree(folder.remaining)
        info = _describe(job, runner, arms, group, len(left))
        if group.first:
            _announce(job, arms, folder, len(left))
            folder.write_json("run.json", info | {"status": "running"})
        title = f"{group.rank + 1}/{group.world}" if group.world > 1 else ""
        try:
            group.all_do(
                lambda: answer_batches(runner, arms, folder, group.deal(left), title=title)
            )
            return group.agree(lambda: _conclude(job, arms, folder, info, started, finish))
        except BaseException:
            if group.first:
                folder.write_json("run.json", info | {"status": "interrupted"})
            raise


def possible_arms(runner: Runner, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """`arms`; those that cannot prune the first readable image as asked are marked unavailable.

    Raises UserInputError if none is left.
    """
    readable = runner.first_image()
    if readable is not None:
        arms = without_impossible(arms, lambda arm: runner.lacking(readable, arm.method))
        able = [arm.method for arm in arms if arm.unavailable is None]
        visual = runner.encode(readable, able)
        arms = without_impossible(arms, lambda arm: runner.refusal(visual, arm))
    reasons = [arm.unavailable for arm in arms]
    if all(reason is not None for reason in reasons):
        raise UserInputError(str(reasons[0]))
    return tuple(arms)


def _conclude(
    job: Job,
    arms: Sequence[Arm],
    folder: RunFolder,
    info: Mapping[str, Any],
    started: float,
    finish: Finish,
) -> int:
    answers, timings = folder.read()
    folder.write_lines("answers.jsonl", answers)
    folder.write_lines("timings.jsonl", timings)
    failed = failed_items(answers)
    seconds = round(time.monotonic() - started, 1)
    done = {"status": "done", "failed_items": failed, "wall_seconds": seconds}
    folder.write_json("run.json", {**info, **done})
    finish(folder, arms, answers)
    if failed:
        print(f"{failed} of {len(job.plan.items)} items were skipped: an image cannot be read")
    return 1 if failed else 0


def _describe(
    job: Job, runner: Runner, arms: Sequence[Arm], group: Processes, left: int
) -> dict[str, Any]:
    batches = len(job.plan.batches)
    return {
        **job.identity,
        "schema_version": SCHEMA_VERSION,
        "task": job.benchmark.name,
        "protocol": job.benchmark.protocol,
        "arms": {arm.name: settings(arm) for arm in arms},
        "command": job.command,
        "git": provenance.git_state(),
        "machine": provenance.machine(str(runner.subject.model.device)),
        "processes": group.world,
        "batches": batches,
        "reused_batches": batches - left,
    }


def _announce(job: Job, arms: Sequence[Arm], folder: RunFolder, left: int) -> None:
    batches = len(job.plan.batches)
    print(f"{len(arms)} arms, {len(job.plan.items)} items; {folder.path}")
    for arm in arms:
        if arm.unavailable is not None:
            print(f"{arm.name} is not available: {arm.unavailable}")
    if left < batches:
        print(f"reusing {batches - left} of {batches} batches answered before")
