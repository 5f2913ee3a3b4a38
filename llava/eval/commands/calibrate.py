"""`llava calibrate`: measure what `pore` and `btp` need to know of a model, once.

    llava calibrate pore --model-path M --task gqa --limit 64 --out curve.json
    llava chat ... --decoder-pruner pore --decoder-option curve=curve.json
    llava calibrate btp --model-path M --task gqa --limit 64 --out stages.json

Nothing is dropped meanwhile. Calibrate on items that are not evaluated: a curve that was fitted on
a benchmark's own items makes its figures on them look better than they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.command_line import natural, positive
from llava.eval.commands.run import add_answering_flags
from llava.eval.engine.provenance import git_state, hash_json, identify
from llava.eval.engine.request import RunRequest, arm_of
from llava.eval.engine.runner import Runner
from llava.eval.tasks.base import Item, get_benchmark
from llava.families.contract import ModelInputs
from llava.families.spec import ModelSpec
from llava.pruning import PruningConfig, PruningError, prune
from llava.pruning.decoder.calibration import (
    LayerChanges,
    PlaceCurve,
    find_stages,
    watching,
)
from llava.pruning.decoder.calibration_file import BTP_STAGES, PORE_CURVE
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.decoder.method import DecoderMethod
from llava.pruning.decoder.methods.pore import PoRe
from llava.pruning.decoder.registry import make_decoder_method
from llava.pruning.decoder.stages import RELEASED
from llava.pruning.flags import given_flags
from llava.sampling import Sampling
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError

HOST = "fastv"
# Drops nothing, but makes splicing say where visual tokens stand.
_WHOLE = PruningConfig.of("fastv", keep_ratio=1.0)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `calibrate` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser(
        "calibrate", help="measure what pore or btp needs to know of a model"
    )
    add = parser.add_argument
    add("method", choices=("pore", "btp"), help="curve of pore, or stages of btp")
    add_answering_flags(parser)
    add("--task", required=True, help="benchmark whose items are read; not one you report")
    add("--protocol", help="prompt protocol of the task; by default its first")
    add("--data-root", type=Path, help="LLaVA's data layout; by default playground/data/eval")
    add("--limit", type=natural, default=64, help="items, the first ones; 0 for all")
    add("--batch-size", type=positive, default=8, help="items per batch")
    add("--host", help=f"of pore: the method whose first cut is debiased; default {HOST}")
    most = len(RELEASED.keep)
    add("--stages", type=positive, help=f"of btp: at most {most}, which is the default")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and write the file.

    Raises:
        UserInputError: a flag that cannot be used, a model without layers to read, or no image.
    """
    _check_flags(args)
    if args.out.suffix != ".json":
        raise UserInputError(f"--out must end in .json, got {args.out}")
    request = _request(args)
    identity = identify(request)
    subject = request.prompted_model.load()
    runner = Runner.of(request, subject, request.plan())
    decoder = subject.decoder_layers()
    measure = _measure_curve if args.method == "pore" else _measure_stages
    found = measure(runner, decoder, args)
    provenance = {
        "model": request.model.path,
        "task": request.benchmark.name,
        "protocol": request.benchmark.protocol,
        "items": identity["config"]["items"],
        "seed": request.seed,
        "source": git_state(),
        "command": request.command,
        **{key: identity[key] for key in identity if key not in ("run_key", "config")},
        "items_sha256": identity["config"]["items_sha256"],
    }
    content = {**found, "provenance": provenance, "sha256": hash_json([found, provenance])}
    write_atomically(args.out, dump_json(content))
    print(f"{', '.join(f'{key} {value}' for key, value in found.items())}\nwritten to {args.out}")
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would change nothing, and set the defaults of those that count."""
    for flag in given_flags(args):
        raise UserInputError(f"calibrate measures the unpruned model; leave {flag} out")
    other = "stages" if args.method == "pore" else "host"
    if getattr(args, other) is not None:
        owner = "btp" if args.method == "pore" else "pore"
        raise UserInputError(f"--{other} is of {owner}, not of {args.method}; leave it out")
    most = len(RELEASED.keep)
    args.host, args.stages = args.host or HOST, args.stages or most
    if args.stages > most:
        raise UserInputError(f"--stages must be at most {most}, got {args.stages}")
    if args.method == "pore":
        PoRe(host=args.host, padding="none")


def _request(args: argparse.Namespace) -> RunRequest:
    cls = get_benchmark(args.task)
    benchmark = cls(args.data_root or cls.default_root, args.protocol)
    benchmark.pixels = args.pixels or benchmark.pixels
    return RunRequest(
        benchmark=benchmark,
        model=ModelSpec.from_flags(args).located(),
        arms=(arm_of(None),),
        sampling=Sampling(temperature=0, max_new_tokens=1),
        output=args.out.parent,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        workers=args.workers,
        command=args.command_line,
    )


def _measure_curve(
    runner: Runner, decoder: DecoderLayers, args: argparse.Namespace
) -> dict[str, Any]:
    layer = scored_layer(make_decoder_method(args.host, {}), len(decoder.layers))
    curve = PlaceCurve(decoder, layer)
    count = _observe_items(runner, decoder, curve)
    mu, sigma = curve.fit()
    found = {"kind": PORE_CURVE, "host": args.host, "sigma": sigma, "mu": mu, "layer": layer}
    return {**found, "items": count}


def _measure_stages(
    runner: Runner, decoder: DecoderLayers, args: argparse.Namespace
) -> dict[str, Any]:
    depth = len(decoder.layers)
    if depth < 2:
        raise PruningError("a language model of one layer has no place to cut")
    changes = LayerChanges(depth)
    count = _observe_items(runner, decoder, changes)
    similarities = changes.similarities()
    layers = find_stages(similarities, args.stages)
    keep = RELEASED.keep[: len(layers)]
    return {
        "kind": BTP_STAGES,
        "layers": layers,
        "keep": [*keep],
        "similarities": similarities,
        "items": count,
    }


def scored_layer(host: DecoderMethod, depth: int) -> int:
    """Return the layer whose attention a host's first cut reads."""
    tokens = 576
    first = host.plan(tokens, depth, 0.75 * tokens if host.budgeted else None).layers[0]
    return first if host.scored_by == "next" else first - 1


def _observe_items(
    runner: Runner, decoder: DecoderLayers, observer: PlaceCurve | LayerChanges
) -> int:
    """Let an observer see the prompts of all items with images that can be read; count these."""
    subject, count = runner.subject, 0
    with torch.inference_mode(), prune(subject.model, _WHOLE):
        for inputs in _prompts_of(runner):
            assert inputs.columns is not None
            with watching(decoder, partial(observer.observe, inputs.columns)):
                subject.generate(inputs, **_one_token(runner))
            count += len(inputs.mask)
    return count


def _one_token(runner: Runner) -> dict[str, Any]:
    subject = runner.subject
    arguments = runner.sampling.arguments_for(subject.model, subject.tokenizer)
    return {**arguments, "num_beams": 1}


def _prompts_of(runner: Runner) -> Iterator[ModelInputs]:
    subject, plan = runner.subject, runner.plan
    names = [[*dict.fromkeys(n for item in batch for n in item.images)] for batch in plan.batches]
    stream = runner.source.stream(names, runner.workers)
    for batch, images in zip(plan.batches, stream, strict=True):
        items: list[Item] = [
            item for item in batch if item.images and not {*item.images} & {*images.failed}
        ]
        if not items:
            continue
        needed = [images.names.index(name) for item in items for name in item.images]
        rows = runner.prompts(items, [len(item.images) for item in items])
        visual = runner.encode(images).take_images(needed)
        placed = subject.place(visual, rows, [item.question for item in items])
        yield subject.splice(subject.prune(placed), rows)
