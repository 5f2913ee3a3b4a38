"""`llava run`: one benchmark, one model, any number of pruning settings.

    llava run --model-path M --task pope --arm none --arm zoo@64
    torchrun --nproc-per-node 4 -m llava.eval run ...    the same, shared by four GPUs

Run the same command again after an interruption: what was answered is kept.
"""

import argparse
from pathlib import Path
from typing import Any

from llava.command_line import add_model_flags, natural, positive
from llava.eval.engine.processes import processes
from llava.eval.engine.provenance import identify, kind_of_device
from llava.eval.engine.request import (
    UNPRUNED,
    Arm,
    RunRequest,
    arm_of,
    arm_word,
    budget_of,
    join_words,
    make_arm,
    parse_arm,
    read_arms,
    saved_pruning,
)
from llava.eval.engine.run import run as run_request
from llava.eval.presets import Preset, get_preset
from llava.eval.tasks.base import get_benchmark
from llava.families.spec import ModelSpec
from llava.mm_utils import get_model_name_from_path
from llava.pruning import PruningConfig, PruningError, parse_options
from llava.pruning.config import CHOICES
from llava.pruning.flags import decoder_from, pruning_from
from llava.sampling import Sampling
from llava.utils import UserInputError


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
        "`none` is the unpruned model; zoo@192+fastv@64 prunes inside the language model too",
    )
    add("--arms", type=Path, metavar="FILE", help="JSON file of settings, as `arms` in run.json")
    add("--preset", help="a named setting of a method, with --keep-tokens or --keep-ratio")
    add("--batch-size", type=positive, default=8, help="items per batch")
    add("--limit", type=natural, default=0, help="items to ask, the first ones; 0 for all")
    add("--num-chunks", type=int, default=1, help="split the items into so many parts")
    add("--chunk-idx", type=int, default=0, help="and ask those of this one, from 0")
    add("--max-new-tokens", type=int, help="longest answer; by default the task's")
    add("--output", type=Path, help="by default outputs/MODEL/TASK-PROTOCOL")
    add("--dry-run", action="store_true", help="print the plan and load no model")
    parser.set_defaults(run=run)


def add_answering_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of everything that answers questions: the model's, and how answers are made."""
    add_model_flags(parser, template="that of LLaVA's evaluation")
    add = parser.add_argument
    add("--seed", type=natural, default=0, help="of methods and decoding that draw at random")
    add(
        "--workers",
        type=natural,
        default=4,
        help="processes that read images ahead; 0 for none",
    )


def run(args: argparse.Namespace) -> int:
    """Answer and score; 1 if some images could not be read."""
    request = request_from(args)
    if not args.dry_run:
        return run_request(request)
    with processes() as group:
        if group.first:
            print(describe(request))
    return 0


def request_from(args: argparse.Namespace) -> RunRequest:
    """Read the flags of `run`.

    Raises:
        UserInputError: one that cannot be used, or a model or data that are not here.
    """
    preset = None if args.preset is None else get_preset(args.preset)
    arms = arms_from(args, preset)
    model = ModelSpec.from_flags(
        args,
        dtype=preset.dtype if preset else None,
        mm_next_protocol=preset.mm_next_protocol if preset else None,
    ).located(download=not args.dry_run)
    if not arms:  # a hub model that a dry run does not download says nothing yet
        here = Path(model.path).is_dir()
        arms = (arm_of(saved_pruning(model.path) if here else None),)
    cls = get_benchmark(args.task)
    benchmark = cls(args.data_root or cls.default_root, args.protocol)
    benchmark.pixels = args.pixels or benchmark.pixels
    longest = benchmark.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    name = get_model_name_from_path(model.path)
    output = args.output or Path("outputs") / name / f"{benchmark.name}-{benchmark.protocol}"
    return RunRequest(
        benchmark=benchmark,
        model=model,
        arms=arms,
        sampling=Sampling(temperature=0, max_new_tokens=longest),
        output=output,
        batch_size=args.batch_size,
        limit=args.limit,
        num_chunks=args.num_chunks,
        chunk_idx=args.chunk_idx,
        seed=args.seed,
        workers=args.workers,
        command=args.command_line,
    )


def arms_from(args: argparse.Namespace, preset: Preset | None = None) -> tuple[Arm, ...]:
    """Read `--arm`, `--arms`, `--preset`, `--pruner` and `--decoder-pruner`.

    Returns:
        The arms, none if none is given.

    Raises:
        UserInputError: a setting does not exist or is given twice.
    """
    arms = [parse_arm(word) for word in args.arm]
    arms += read_arms(args.arms) if args.arms is not None else []
    own = parse_options(args.pruner_option)
    own |= {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    if preset is not None:
        if args.pruner is not None or args.pruner_option:
            raise UserInputError("--preset names method and options; leave --pruner out")
        arms.append(_flag_arm(args, preset.name, preset.method, dict(preset.options), own))
    elif args.pruner is not None:
        arms.append(_flag_arm(args, args.pruner, args.pruner, {}, own))
    else:
        config = pruning_from(args)  # refuses a budget or options without a method
        arms += [] if config is None else [arm_of(config)]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserInputError(f"the arm {name} is given twice")
    return tuple(arms)


def _flag_arm(
    args: argparse.Namespace, title: str, method: str, given: dict[str, Any], own: dict[str, Any]
) -> Arm:
    """Make the arm of `--pruner` or `--preset`, called by `title`, its own options and budget."""
    if args.keep_tokens is not None and args.keep_ratio is not None:
        raise PruningError("give --keep-tokens or --keep-ratio, not both")
    budget = args.keep_tokens if args.keep_ratio is None else args.keep_ratio
    decoder = decoder_from(args)
    if method == UNPRUNED:
        if decoder is not None:
            return arm_of(PruningConfig.of(UNPRUNED, decoder=decoder, **own))
        return make_arm(UNPRUNED, method, None, own)
    name = arm_word(title, budget, own)
    if decoder is not None:
        after = arm_word(decoder.method, budget_of(decoder), decoder.options)
        name = join_words(name, after)
    return make_arm(name, method, budget, {**given, **own}, decoder)


def describe(request: RunRequest) -> str:
    """Describe what would run. Loads nothing; the run key needs a checkpoint that is here."""
    model, benchmark, plan = request.model, request.benchmark, request.plan()
    absent = [path for path in (model.path, model.base) if path and not Path(path).is_dir()]
    if absent:
        key = f"known once {' and '.join(absent)} is downloaded"
    else:
        key = identify(request)["run_key"]
    unread = model.path in absent and model.conv_mode is None
    template = (
        f"{request.template} (of a LLaVA; others have their own)" if unread else request.template
    )
    lines = [
        f"task      {benchmark.name}, protocol {benchmark.protocol}, from {benchmark.root}",
        f"items     {len(plan.items)} about {len(plan.images())} images, in {len(plan.batches)} "
        f"batches of {request.batch_size}",
        f"model     {model.path} on {kind_of_device(model.device)}, template {template}, "
        f"at most {request.sampling.max_new_tokens} new tokens",
        f"pixels    {benchmark.pixels}",
        *(f"arm       {arm.name}: {arm.label}" for arm in request.arms),
        f"output    {request.output}",
        f"run key   {key}",
    ]
    return "\n".join(lines)
