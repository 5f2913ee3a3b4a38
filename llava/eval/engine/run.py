"""Carry out a request: answer what is missing, alone or with others, score it and write it."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from llava.eval.engine import provenance
from llava.eval.engine.batches import Plan
from llava.eval.engine.metrics import count_failed, summarise
from llava.eval.engine.processes import Processes, processes
from llava.eval.engine.request import Arm, RunRequest
from llava.eval.engine.run_folder import RunFolder
from llava.eval.engine.runner import Runner
from llava.eval.engine.schema import SCHEMA_VERSION, Record
from llava.families.contract import VisionLanguageModel
from llava.families.spec import ModelSpec
from llava.storage import exclusive
from llava.utils import UserInputError

FILES = ("run.json", "answers.jsonl", "metrics.json", "timings.jsonl")
SUBMISSIONS = "submissions"
SHOWN_ARMS = 3  # running scores next to the bar


@dataclass(frozen=True)
class OpenRun:
    """A run that is ready to be answered.

    Attributes:
        request: what is asked.
        runner: with the loaded model and the plan.
        arms: of the request, those that cannot run with their reason.
        folder: `OUTPUT/runs/<run key>`.
    """

    request: RunRequest
    runner: Runner
    arms: tuple[Arm, ...]
    folder: RunFolder

    @property
    def plan(self) -> Plan:
        """What is asked, in batches."""
        return self.runner.plan


@dataclass(frozen=True)
class Answered(OpenRun):
    """A run whose items are all answered.

    Attributes:
        info: the content of `run.json`.
        answers, timings: all records.
    """

    info: Record
    answers: list[Record]
    timings: list[Record]


def mark_unavailable(runner: Runner, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Return the arms; those that cannot prune the first readable image say why.

    Raises:
        UserInputError: no arm is left.
    """
    images = runner.first_image()
    if images is not None:
        arms = [runner.tried(images, arm) for arm in arms]
    reasons = [arm.unavailable for arm in arms]
    if all(reason is not None for reason in reasons):
        raise UserInputError(str(reasons[0]))
    return tuple(arms)


ChooseArms = Callable[[Runner, Sequence[Arm]], tuple[Arm, ...]]
LoadModel = Callable[[ModelSpec], VisionLanguageModel]
Report = Callable[[Answered], None]


def run(
    request: RunRequest,
    *,
    choose_arms: ChooseArms = mark_unavailable,
    load: LoadModel | None = None,
    report: Report | None = None,
    more_files: Sequence[str] = (),
) -> int:
    """Answer and score every item under every arm, and write the files of the run.

    Args:
        request: what to run.
        choose_arms: fits the arms to the loaded model.
        load: returns the model, which several runs may share; by default it is loaded.
        report: writes more files into the run's folder and prints what it found; by default the
            main figure of every arm is printed.
        more_files: names of those files, published with the others.

    Returns:
        1 if some items could not be asked, because an image of theirs cannot be read, else 0.

    Raises:
        UserInputError: see `answer`.
    """
    files = (*FILES, *more_files)

    def finish(done: Answered) -> None:
        metrics = summarise(request.benchmark, done.plan, done.arms, done.answers)
        done.folder.write_json("metrics.json", metrics)
        write_submissions(done)
        if report is None:
            print(f"\n{figures(metrics)}")
        else:
            report(done)
        publish(done.folder.path, request.output, files)
        print(f"written to {request.output}: {', '.join(files)}")

    with processes() as group:
        return answer(request, group, finish, choose_arms=choose_arms, load=load, files=files)


def answer(
    request: RunRequest,
    group: Processes,
    finish: Callable[[Answered], None],
    *,
    choose_arms: ChooseArms = mark_unavailable,
    load: LoadModel | None = None,
    files: Sequence[str] = (),
) -> int:
    """Answer what no log has yet, then call `finish` in process 0.

    Args:
        request: what to run.
        group: the processes that share the run.
        finish: writes what readers want.
        choose_arms, load: see `run`.
        files: what `finish` publishes; copies of another run are removed first.

    Returns:
        See `run`.

    Raises:
        UserInputError: another run on the same output, a model that cannot be loaded, no arm that
            can prune as asked, a full disk.
    """
    started = time.monotonic()
    plan = request.plan()
    identity = group.agree(lambda: provenance.identify(request))
    run_key = identity["run_key"]
    device = group.device(request.model.device)
    with ExitStack() as stack:

        def prepare() -> OpenRun:
            subject = (load or ModelSpec.load)(replace(request.prompted_model, device=device))
            runner = Runner.of(request, subject, plan, run_key)
            arms = choose_arms(runner, request.arms)
            running = sum(arm.unavailable is None for arm in arms)
            sizes = [running * len(batch) for batch in plan.batches]
            folder = RunFolder(request.output / "runs" / run_key[:16], sizes, group.rank)
            return OpenRun(request, runner, arms, stack.enter_context(closing(folder)))

        group.agree(lambda: stack.enter_context(exclusive(request.output)))
        group.agree(lambda: withdraw(request.output, run_key, files))
        opened = group.all_do(prepare)
        left = group.agree(opened.folder.remaining)
        info = identity | _describe(opened, group, len(left))

        if group.first:
            _announce(opened, len(left))
            opened.folder.write_json("run.json", info | {"status": "running"})
        try:
            group.all_do(lambda: answer_batches(opened, group, group.deal(left)))
            seconds = round(time.monotonic() - started, 1)
            done = {**info, "status": "done", "wall_seconds": seconds}
            return group.agree(lambda: _conclude(opened, done, finish))
        except BaseException:
            if group.first:
                opened.folder.write_json("run.json", info | {"status": "interrupted"})
            raise


def _conclude(opened: OpenRun, info: Record, finish: Callable[[Answered], None]) -> int:
    folder, plan = opened.folder, opened.plan
    answers, timings = folder.read()
    folder.write_lines("answers.jsonl", answers)
    folder.write_lines("timings.jsonl", timings)
    failed = count_failed(answers)
    info = {**info, "failed_items": failed}
    folder.write_json("run.json", info)
    finish(Answered(opened.request, opened.runner, opened.arms, folder, info, answers, timings))
    if failed:
        print(f"{failed} of {len(plan.items)} items were skipped: an image cannot be read")
    return 1 if failed else 0


def answer_batches(opened: OpenRun, group: Processes, numbers: Sequence[int]) -> None:
    """Answer the numbered batches under a progress bar and log each.

    The bar's scores include what the logs had before.
    """
    folder = opened.folder
    sizes = [len(batch) for batch in opened.plan.batches]
    left = sum(sizes[number] for number in numbers)
    scores: dict[str, list[float]] = defaultdict(list)
    add_scores(scores, folder.read()[0])
    start, tokens = time.monotonic(), 0
    bar = tqdm(
        total=sum(sizes),
        initial=sum(sizes) - left,
        unit="item",
        desc=f"{group.rank + 1}/{group.world}" if group.world > 1 else None,
        dynamic_ncols=True,
    )
    with bar, closing(opened.runner.run(opened.arms, numbers)) as batches:
        for number, (answers, timings) in zip(numbers, batches, strict=True):
            folder.append(answers, timings)
            for reason in sorted({line["error"] for line in answers if "error" in line}):
                bar.write(f"skipped: {reason}")
            add_scores(scores, answers)
            tokens += sum(line["new_tokens"] for line in timings)
            speed = tokens / max(1e-9, time.monotonic() - start)
            bar.set_postfix_str(f"{show_scores(scores)} | {speed:.1f} tokens/s", refresh=False)
            bar.update(sizes[number])


def add_scores(scores: dict[str, list[float]], answers: Sequence[Record]) -> None:
    """Add the scores of more answers to those of their arms."""
    for line in answers:
        if line["score"] is not None:
            scores[line["arm"]].append(line["score"])


def show_scores(scores: Mapping[str, Sequence[float]]) -> str:
    """Write the mean score of the first arms so far, in per cent."""
    shown = [f"{arm} {100 * fmean(own):.1f} %" for arm, own in scores.items()]
    return ", ".join(shown[:SHOWN_ARMS]) or "no scores"


def write_submissions(done: Answered) -> None:
    """Write what the benchmark's own scorer or server takes, one folder per arm."""
    folder, items = done.folder.path / SUBMISSIONS, done.plan.items
    for number, arm in enumerate(done.arms):
        said = {line["index"]: line["answer"] for line in done.answers if line["arm"] == arm.name}
        if not said:
            continue
        # The number tells arms apart, so a long name may be cut: file systems allow 255 bytes.
        own = folder / f"{number}-{''.join(c if c.isalnum() else '_' for c in arm.name)}"[:200]
        own.mkdir(parents=True, exist_ok=True)
        answers = [said[item.index] for item in items]
        done.request.benchmark.write_submission(items, answers, own)
        if not any(own.iterdir()):
            own.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def publish(folder: Path, output: Path, files: Sequence[str]) -> None:
    """Copy the files of a finished run to where readers look for them."""
    for name in files:
        shutil.copyfile(folder / name, output / name)
    if any((folder / SUBMISSIONS).glob("*")):
        shutil.copytree(folder / SUBMISSIONS, output / SUBMISSIONS, dirs_exist_ok=True)


def withdraw(output: Path, run_key: str, files: Sequence[str]) -> None:
    """Remove the published copies of another run, so that they are not read as this one's."""
    info = output / "run.json"
    if info.is_file() and f'"run_key": "{run_key}"' not in info.read_text(encoding="utf-8"):
        for name in files:
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / SUBMISSIONS, ignore_errors=True)


def figures(metrics: Record) -> str:
    """Write the main figure of every arm, one a line."""
    lines = []
    for name, arm in metrics["arms"].items():
        figure = arm["metrics"].get(metrics["headline"])
        if arm.get("unavailable"):
            shown = f"n/a: {arm['unavailable']}"
        elif arm["answered"] == 0:
            shown = "n/a: no item could be asked"
        elif figure is None:
            shown = "answered; its figures come from a server or a grader"
        else:
            error = "" if figure["se"] is None else f" ± {figure['se']:.2f}"
            shown = f"{metrics['headline']} {figure['value']:.2f}{error} (n = {figure['n']})"
        lines.append(f"{name}: {shown}")
    return "\n".join(lines)


def _describe(opened: OpenRun, group: Processes, left: int) -> Record:
    request, batches = opened.request, len(opened.plan.batches)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": request.benchmark.name,
        "protocol": request.benchmark.protocol,
        "arms": {arm.name: arm.to_dict() for arm in opened.arms},
        "command": request.command,
        "git": provenance.git_state(),
        "machine": provenance.machine(str(opened.runner.subject.model.device)),
        "processes": group.world,
        "batches": batches,
        "reused_batches": batches - left,
    }


def _announce(opened: OpenRun, left: int) -> None:
    arms, plan = opened.arms, opened.plan
    print(f"{len(arms)} arms, {len(plan.items)} items; {opened.folder.path}")
    for arm in arms:
        if arm.unavailable is not None:
            print(f"{arm.name} is not available: {arm.unavailable}")
    batches = len(plan.batches)
    if left < batches:
        print(f"reusing {batches - left} of {batches} batches answered before")
