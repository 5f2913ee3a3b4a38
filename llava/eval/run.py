"""`python -m llava.eval run`: one benchmark, one model, any number of pruning settings.

    python -m llava.eval run --model-path M --task pope --arm none --arm zoo@64
    torchrun --nproc-per-node 4 -m llava.eval run ...    the same, shared by four GPUs

Run the same command again after an interruption: what was answered is kept.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.command_line import add_model_flags, check_conv_mode
from llava.conversation import conv_mode_for
from llava.eval.arm_words import arm_of, arms_from, preset_of, saved_pruning
from llava.eval.arms import Arm
from llava.eval.execution import Job, Model, execute
from llava.eval.identity import identity, machine_settings
from llava.eval.plan import Plan, chunk_of
from llava.eval.provenance import hash_json
from llava.eval.results import Record, RunFolder
from llava.eval.sharding import processes
from llava.eval.summary import settings, summarise
from llava.eval.tasks.base import Benchmark, get_benchmark
from llava.mm_utils import get_model_name_from_path
from llava.model.checkpoint import checkpoint_here, local_checkpoint, read_config
from llava.model.loaded import loading_from
from llava.sampling import Sampling
from llava.utils import UserInputError

FILES = ("run.json", "answers.jsonl", "metrics.json", "timings.jsonl")
SUBMISSIONS = "submissions"
# LLaVA's evaluation scripts ask the checkpoints of its demo with a template of their own.
EVALUATION_TEMPLATES = {"llava_v1": "vicuna_v1"}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `run` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("run", help="run a benchmark under one or more pruning settings")
    add = parser.add_argument
    add_answering_flags(parser)
    add("--task", required=True, help="benchmark, such as pope")
    add("--protocol", help="prompt protocol of the task; by default its first")
    add("--data-root", type=Path, help="LLaVA's data layout; by default playground/data/eval")
    add(
        "--arm",
        action="append",
        default=[],
        metavar="METHOD[:KEY=VALUE,...]@BUDGET",
        help="one setting, repeatable; BUDGET is a number of tokens, or a share such as 0.1; "
        "`none` is the unpruned model",
    )
    add("--preset", help="a named setting of a method, with --keep-tokens or --keep-ratio")
    add("--batch-size", type=int, default=8, help="items per batch")
    add("--limit", type=int, default=0, help="items to ask, the first ones; 0 for all")
    add("--num-chunks", type=int, default=1, help="split the items into so many parts")
    add("--chunk-idx", type=int, default=0, help="and ask those of this one, from 0")
    add("--max-new-tokens", type=int, help="longest answer; by default the task's")
    add("--output", type=Path, help="by default outputs/MODEL/TASK-PROTOCOL")
    add("--dry-run", action="store_true", help="print the plan and load no model")
    parser.set_defaults(run=run)


def add_answering_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that answers questions: the model's, and how answers are made."""
    add_model_flags(parser, template="that of LLaVA's evaluation")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of methods and decoding that draw at random")
    add("--workers", type=int, default=4, help="processes that read images ahead; 0 for none")


def run(args: argparse.Namespace) -> int:
    """Answer and score; 1 if some images could not be read."""
    if args.limit < 0 or args.batch_size < 1 or args.seed < 0 or args.workers < 0:
        raise UserInputError(
            "--limit, --seed and --workers must be at least 0, --batch-size at least 1"
        )
    arms = arms_from(args)
    find_models(args, download=not args.dry_run)
    if not arms:  # a hub model that a dry run does not download says nothing yet
        here = Path(args.model_path).is_dir()
        arms = (arm_of(saved_pruning(args.model_path) if here else None),)
    cls = get_benchmark(args.task)
    benchmark = cls(args.data_root or cls.default_root, args.protocol)
    benchmark.pixels = args.pixels or benchmark.pixels
    plan = plan_of(benchmark, args)
    model = model_of(args, preset_of(args))
    longest = benchmark.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(temperature=0, max_new_tokens=longest)
    name = get_model_name_from_path(args.model_path)
    output = args.output or Path("outputs") / name / f"{benchmark.name}-{benchmark.protocol}"
    with processes() as group:
        config = describe(args, benchmark, plan, arms, model, sampling)
        if args.dry_run:
            if group.first:
                print(dry_run(args, benchmark, plan, arms, config, output))
            return 0
        whole = group.agree(lambda: identity(config, benchmark, args.model_path, args.model_base))
        job = Job(
            model,
            benchmark,
            plan,
            arms,
            sampling,
            args.seed,
            args.workers,
            output,
            whole,
            args.command_line,
        )

        def finish(folder: RunFolder, ran: Sequence[Arm], answers: list[Record]) -> None:
            metrics = summarise(benchmark, plan, ran, answers)
            folder.write_json("metrics.json", metrics)
            write_submissions(benchmark, plan, ran, answers, folder.path / SUBMISSIONS)
            publish(folder.path, output)
            print(f"\n{figures(metrics)}\nwritten to {output}: {', '.join(FILES)}")

        return execute(job, group, finish, begin=lambda: withdraw(output, whole["run_key"]))


def find_models(args: argparse.Namespace, *, download: bool = True) -> None:
    """Put folders in place of `--model-path` and `--model-base`, so that what follows reads files.

    A hub name that is not here yet is downloaded, or stays without `download`.

    Raises UserInputError for what is neither a folder nor a hub name, or cannot be downloaded.
    """
    find = local_checkpoint if download else checkpoint_here
    for flag in ("model_path", "model_base"):
        given = getattr(args, flag)
        if given is not None:
            setattr(args, flag, str(find(given) or given))


def plan_of(benchmark: Benchmark, args: argparse.Namespace) -> Plan:
    """The items that the flags ask for, in batches."""
    items = benchmark.items()[: args.limit or None]
    chunk = chunk_of(items, args.num_chunks, args.chunk_idx)
    if not chunk:
        raise UserInputError(
            f"chunk {args.chunk_idx} of {args.num_chunks} is empty: there are only {len(items)} "
            "items; use fewer chunks"
        )
    return Plan.of(chunk, args.batch_size)


def model_of(args: argparse.Namespace, preset: Any = None) -> Model:
    """The model that the flags name, not loaded; what they leave open, `preset` decides.

    Raises UserInputError for an unknown template.
    """
    check_conv_mode(args.conv_mode)
    folder = Path(args.model_path)
    config = read_config(folder) if folder.is_dir() else None
    own = conv_mode_for(get_model_name_from_path(args.model_path), config)
    template = args.conv_mode or EVALUATION_TEMPLATES.get(own, own)
    loading = loading_from(args, preset and preset.dtype, preset and preset.mm_next_protocol)
    return Model(args.model_path, args.model_base, args.device, template, loading)


def describe(
    args: argparse.Namespace,
    benchmark: Benchmark,
    plan: Plan,
    arms: Sequence[Arm],
    model: Model,
    sampling: Sampling,
) -> dict[str, Any]:
    """Every setting that can change an answer."""
    asked = [[i.index, i.question_id, i.images, i.text, i.question] for i in plan.items]
    return {
        "task": benchmark.name,
        "protocol": benchmark.protocol,
        "arms": {arm.name: settings(arm) for arm in arms},
        "batch_size": args.batch_size,
        "items": len(asked),
        "items_sha256": hash_json(asked),
        "seed": args.seed,
        "template": model.template,
        "pixels": benchmark.pixels,
        "loading": dict(model.loading),
        "sampling": asdict(sampling),
        **machine_settings(model.device),
    }


def dry_run(
    args: argparse.Namespace,
    benchmark: Benchmark,
    plan: Plan,
    arms: Sequence[Arm],
    config: dict[str, Any],
    output: Path,
) -> str:
    """The plan in words. Loads nothing; the run key needs a checkpoint that is here."""
    models = (args.model_path, args.model_base)
    absent = [path for path in models if path and not Path(path).is_dir()]
    if not absent:
        key = identity(config, benchmark, args.model_path, args.model_base)["run_key"]
    else:
        key = f"known once {' and '.join(absent)} is downloaded"
    lines = [
        f"task      {benchmark.name}, protocol {benchmark.protocol}, from {benchmark.root}",
        f"items     {len(plan.items)} about {len(plan.images())} images, in {len(plan.batches)} "
        f"batches of {args.batch_size}",
        f"model     {args.model_path} on {config['device']}, template {config['template']}, "
        f"at most {config['sampling']['max_new_tokens']} new tokens",
        f"pixels    {config['pixels']}",
        *(f"arm       {arm.name}: {arm.label}" for arm in arms),
        f"output    {output}",
        f"run key   {key}",
    ]
    return "\n".join(lines)


def write_submissions(
    benchmark: Benchmark, plan: Plan, arms: Sequence[Arm], answers: list[Record], folder: Path
) -> None:
    """What the benchmark's own scorer or server takes, one folder per arm."""
    for number, arm in enumerate(arms):
        said = {line["index"]: line["answer"] for line in answers if line["arm"] == arm.name}
        if not said:
            continue
        # The number tells arms apart, so a long name may be cut: file systems allow 255 bytes.
        own = folder / f"{number}-{''.join(c if c.isalnum() else '_' for c in arm.name)}"[:200]
        own.mkdir(parents=True, exist_ok=True)
        benchmark.write_submission(plan.items, [said[item.index] for item in plan.items], own)
        if not any(own.iterdir()):
            own.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def publish(folder: Path, output: Path) -> None:
    """Copy the files of a finished run to where readers look for them."""
    for name in FILES:
        shutil.copyfile(folder / name, output / name)
    if any((folder / SUBMISSIONS).glob("*")):
        shutil.copytree(folder / SUBMISSIONS, output / SUBMISSIONS, dirs_exist_ok=True)


def withdraw(output: Path, run_key: str) -> None:
    """Take back the published copies of another run, so that nobody reads them for this one's."""
    info = output / "run.json"
    if info.is_file() and f'"run_key": "{run_key}"' not in info.read_text(encoding="utf-8"):
        for name in FILES:
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / SUBMISSIONS, ignore_errors=True)


def figures(metrics: Record) -> str:
    """The main figure of every arm, one a line."""
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
