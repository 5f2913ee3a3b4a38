"""`llava bench`: what pruning costs and saves on this machine, stage by stage.

llava bench                                            llava-tiny's shapes, about half a minute
llava bench --config llava-1.5-7b --layers 2 --dtype bfloat16 --output 7b.json
llava bench --from 7b.json --plot 7b.png               tables and picture of a file
llava bench --scaling --output scaling.json            the stage alone, over sizes
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava.bench.arms import make_arms, split_method
from llava.bench.configs import NAMES, SHAPES, shape_of
from llava.bench.gpu_report import find_part, render_gpu, render_stage
from llava.bench.plots import check_plot, draw_bench, draw_scaling
from llava.bench.ratios import render_ratios
from llava.bench.report import render
from llava.bench.run import Plan, run_bench
from llava.bench.scaling import DEFAULT, METHODS, render_scaling, run_scaling
from llava.bench.schema import read_bench
from llava.command_line import DTYPES, OneLineParser, device_name, one_line_errors, positive
from llava.eval.engine import provenance
from llava.markdown import add_update_flag, fill_sections
from llava.pruning.config import CHOICES
from llava.pruning.decoder.config import DecoderConfig
from llava.shipped import LLAVA_TINY
from llava.storage import write_atomically
from llava.utils import UserInputError

PRUNERS = ("zoo-exact", "divprune", "zoo")
# Not offered: where kept tokens stand changes no time, and every prompt has one image.
_WITHOUT = ("positions", "scope")
# Flags without a meaning for --scaling, and those of it alone.
_OF_A_RUN = (
    "model_path",
    "config",
    "layers",
    "keep_tokens",
    "decoder_pruner",
    "decoder_keep_tokens",
    "decoder_keep_ratio",
    "compare_with",
    "batch",
    "answer",
    "text_tokens",
    "repeats",
    *(name for name in CHOICES if name not in _WITHOUT),
)
_OF_SIZES = ("scaling", "seconds")


def main(argv: Sequence[str] | None = None, prog: str = "llava bench") -> int:
    """Run the command; 0 if it did its work, 2 with one line on stderr for unusable input."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(prog)
    args = parser.parse_args(words)
    with one_line_errors(parser):
        _check(args)
        if args.source is not None:
            result = read_bench(args.source)
            if args.part is not None:
                result = find_part(result, args.part, args.source)
        else:
            facts = describe_run(shlex.join([*prog.split(), *words]), args.device, args.commit)
            with _enough_memory():
                result = _scale(args, facts) if args.scaling else _bench(args, facts)
        _show(args, result)
    return 0


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Say what to do where a model does not fit: torch has no error of its own for a CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise UserInputError(
            "there is too little memory; give fewer --layers, a smaller --batch, "
            f"--dtype bfloat16, or another --device ({said})"
        ) from error


def build_parser(prog: str = "llava bench") -> OneLineParser:
    """Return the parser of the command."""
    parser = OneLineParser(prog=prog, description="What pruning costs and saves on this machine.")
    add = parser.add_argument
    add("--model-path", help="checkpoint folder or hub name")
    add(
        "--config", help=f"or a shape with random weights: {', '.join(NAMES)}; default {LLAVA_TINY}"
    )
    add(
        "--pruner",
        type=_words,
        metavar="METHOD,...",
        help=f"methods, options after a colon as in zoo:directions=32; default {','.join(PRUNERS)}",
    )
    add("--keep-tokens", type=_numbers, metavar="N,...", help="budgets; default: the papers'")
    add(
        "--decoder-pruner",
        type=_words,
        metavar="METHOD,...",
        help="methods between layers, behind every other one: zoo@192+fastv@64; alone with "
        "--pruner none",
    )
    add(
        "--decoder-keep-tokens",
        type=_numbers,
        metavar="N,...",
        help="their budgets, means over layers; default: their published schedules",
    )
    add(
        "--decoder-keep-ratio",
        type=_shares,
        metavar="R,...",
        help="or shares of an image's tokens, in (0, 1]",
    )
    for name, (values, summary) in CHOICES.items():
        if name not in _WITHOUT:
            add(f"--{name}", choices=values, help=f"{summary}; default {values[0]}")
    add("--batch", type=_numbers, metavar="N,...", help="images a batch; default 1")
    add(
        "--answer",
        type=_numbers,
        metavar="N,...",
        help="lengths of answers in tokens; default 1,16,128",
    )
    add("--text-tokens", type=positive, help="of a prompt beside its image; default 60")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--dtype", choices=DTYPES, help="by default bfloat16, float32 on the CPU")
    add("--layers", type=positive, help="decoder layers to run; times are scaled to all of them")
    add("--repeats", type=positive, help="how often every arm is run; default 10")
    add("--compare-with", type=Path, metavar="CHECKOUT", help="run another source tree's arms too")
    add("--scaling", action="store_true", help="the stage alone, over sizes")
    add("--seconds", type=float, help="of every size in --scaling; default 2")
    add("--output", type=Path, metavar="JSON", help="write raw times, after every repeat")
    add("--commit", help="of this source, where git cannot tell")
    add("--from", dest="source", type=Path, metavar="JSON", help="read a file, run nothing")
    add("--part", metavar="NAME", help="of a gpu.json in --from, such as 'bench llava-1.5-7b'")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="PNG", help="draw the picture")
    add_update_flag(
        parser,
        "write the tables between the markers of this file that are named like the JSON file",
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    """Read METHOD[:KEY=VALUE[,KEY=VALUE]],...; a word with `=` belongs to the method before it."""
    words: list[str] = []
    for part in text.split(","):
        name, equals, _ = part.partition("=")
        if equals and ":" not in name and words:
            words[-1] += f",{part}"
        else:
            words.append(part)
    return tuple(words)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,... such as 0.25,0.5") from error


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything is built."""
    if args.model_path and args.config:
        raise UserInputError("give --model-path or --config, not both")
    if args.layers and args.model_path:
        raise UserInputError("--layers needs --config: a checkpoint runs with all its layers")
    for flag in ("decoder_keep_tokens", "decoder_keep_ratio"):
        if getattr(args, flag) and not args.decoder_pruner:
            raise UserInputError(f"--{flag.replace('_', '-')}: give --decoder-pruner too")
    if args.update and not (args.output or args.source):
        raise UserInputError(
            "--update needs --output or --from: its section is named like the file"
        )
    if args.part is not None and args.source is None:
        raise UserInputError("--part needs --from: it is a part of that file")
    if args.source is not None:
        _refuse(
            args,
            (*_OF_A_RUN, *_OF_SIZES, "pruner", "dtype", "output", "commit"),
            "--from runs nothing",
        )
    elif args.scaling:
        _refuse(args, _OF_A_RUN, "--scaling has sizes of its own")
    elif args.seconds is not None:
        raise UserInputError("--seconds is of every size in --scaling; give --scaling too")
    for file in args.update:
        fill_sections(file, {_section(args): ""})
    if args.plot:
        check_plot(args.plot)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UserInputError(f"{why}; leave out --{name.replace('_', '-')}")


def _section(args: argparse.Namespace) -> str:
    """Return the name of the section that `--update` fills."""
    if args.part is not None:
        return args.part.replace(" ", "-")
    return (args.source or args.output).stem


def describe_run(command: str, device: str, commit: str | None) -> dict[str, Any]:
    """Return command, commit, versions and machine, as files of results have them."""
    state = {"commit": commit, "dirty": None} if commit else provenance.git_state()
    return {
        "command": command,
        "commit": state,
        "versions": provenance.package_versions(),
        "machine": provenance.machine(str(resolve_device(device))),
    }


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto` means here; another name as it is.

    Raises:
        UserInputError: a GPU that is not there.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not found:
        raise UserInputError(f"--device {name}: torch finds no CUDA GPU here; use cpu or auto")
    return device


def _dtype(args: argparse.Namespace) -> str:
    device = resolve_device(args.device)
    return args.dtype or ("float32" if device.type == "cpu" else "bfloat16")


def _bench(args: argparse.Namespace, facts: dict[str, Any]) -> Any:
    config = None if args.model_path else args.config or LLAVA_TINY
    budgets = args.keep_tokens
    if budgets is None:
        budgets = shape_of(config).budgets if config else SHAPES["llava-1.5-7b"].budgets
    choices = {
        name: getattr(args, name)
        for name in CHOICES
        if name not in _WITHOUT and getattr(args, name) is not None
    }
    arms = make_arms(args.pruner or PRUNERS, budgets, choices, _between(args), _say)
    plan = Plan(
        config,
        args.model_path,
        str(resolve_device(args.device)),
        _dtype(args),
        args.layers,
        args.text_tokens or 60,
        tuple(arm.to_dict() for arm in arms),
        args.batch or (1,),
        args.answer or (1, 16, 128),
        args.repeats or 10,
    )
    return run_bench(plan, facts, args.output, args.compare_with, say=_say)


def _between(args: argparse.Namespace) -> list[DecoderConfig]:
    """Return what the flags drop between layers: every method at every budget."""
    budgets: list[dict[str, Any]] = [{"keep_tokens": own} for own in args.decoder_keep_tokens or ()]
    budgets += [{"keep_ratio": own} for own in args.decoder_keep_ratio or ()]
    found = []
    for word in args.decoder_pruner or ():
        method, options = split_method(word)
        found += [DecoderConfig(method, **own, options=options) for own in budgets or [{}]]
    return found


def _scale(args: argparse.Namespace, facts: dict[str, Any]) -> Any:
    return run_scaling(
        args.pruner or METHODS,
        facts,
        device=resolve_device(args.device),
        dtype=getattr(torch, _dtype(args)),
        seconds=2.0 if args.seconds is None else args.seconds,
        output=args.output,
        default=DEFAULT,
        say=_say,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(args: argparse.Namespace, result: Any) -> None:
    """Print the tables of a result, and write what the flags ask for."""
    if args.plot and result["kind"] == "gpu":
        raise UserInputError(f"{args.source} has several pictures; choose one with --part")
    if args.plot and result["kind"] == "stage":
        raise UserInputError(f"--part {args.part!r} is a table without a picture; leave out --plot")
    show: Callable[[Any], str] = _TABLES[result["kind"]]
    text = show(result)
    print(text)
    if args.markdown:
        write_atomically(args.markdown, text + "\n")
    if result["kind"] == "bench" and result["conditions"]["device"] == "cpu":
        text = render_ratios(result)  # a CPU's times say little in a document
    for file in args.update:
        write_atomically(file, fill_sections(file, {_section(args): text}))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw: Callable[[Any], Any] = draw_scaling if result["kind"] == "scaling" else draw_bench
        draw(result).savefig(args.plot)


_TABLES: dict[str, Callable[[Any], str]] = {
    "bench": render,
    "scaling": render_scaling,
    "gpu": render_gpu,
    "stage": render_stage,
}
