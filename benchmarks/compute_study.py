"""Compare scores of every `compute` with float64: `python benchmarks/compute_study.py`.

The products behind `zoo` and `zoo-exact` may run in bfloat16 in 16-bit models. This says what that
changes: the rank correlation of the scores with those of float64, and the share of the kept tokens
that stays the same. `compute=auto` is chosen by it.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.engine import provenance
from llava.eval.engine.schema import SCHEMA_VERSION, ResultError
from llava.eval.report.result import describe_commit
from llava.markdown import fill_sections, table
from llava.model.builder import load_pretrained_model
from llava.pruning import max_min, sensitivity
from llava.pruning.importance.normalise import min_max
from llava.storage import dump_json, write_atomically
from llava.world import render

PROGRAM = "python benchmarks/compute_study.py"
SECTION = "compute-study"
MODEL = Path("playground/llava-tiny")
KEEP = 64
ESTIMATORS = {"zoo": "zeroth_order", "zoo-exact": "exact"}
COMPUTE = ("float32", "split", "bf16")
# What a precision must reach on trained weights and features to be the default.
LEAST_CORRELATION, LEAST_SHARE = 0.9999, 0.99


class Source(NamedTuple):
    """A Linear-GELU-Linear network and what it is fed with.

    Attributes:
        name: what it is.
        trained: whether weights and features are.
        layers: the network, float32.
        features: [N, Dv] of every image, float32.
    """

    name: str
    trained: bool
    layers: nn.Sequential
    features: list[Tensor]


@torch.inference_mode()
def trained_sources(images: int) -> list[Source]:
    """Return llava-tiny's projector, and the feed-forward layers of its tower's last used block.

    The tower's activation is the quick GELU, an approximation of the GELU that stands in here.
    """
    _, model, processor, _ = load_pretrained_model(str(MODEL), device="cpu")
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    block = tower.vision_tower.encoder.layers[-2].mlp
    inputs: list[Tensor] = []
    features = []
    hook = block.fc1.register_forward_pre_hook(
        lambda layer, args: inputs.append(args[0][0, 1:].clone())  # without the class token
    )
    for number in range(images):
        pixels = processor.preprocess(render(f"test/{number:06d}"), return_tensors="pt")
        features.append(tower(pixels["pixel_values"])[0].clone())
    hook.remove()
    feed_forward = nn.Sequential(block.fc1, nn.GELU(), block.fc2)
    return [
        Source("llava-tiny, projector", True, projector, features),
        Source("llava-tiny, feed-forward layers of the tower", True, feed_forward, inputs),
    ]


def random_source(images: int, dv: int = 1024, width: int = 4096) -> Source:
    """Return random weights and features at the size of LLaVA-1.5-7B."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(dv, width), nn.GELU(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    features = [torch.randn(576, dv, generator=generator) for _ in range(images)]
    return Source("random, as wide as LLaVA-1.5-7B", False, layers, features)


def measure(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return a row for every source, model type, method and precision."""
    rows = []
    for source in sources:
        for dtype in (torch.bfloat16, torch.float16):
            for method, estimator in ESTIMATORS.items():
                for compute, found in _compared(source, dtype, estimator).items():
                    correlations, shares = zip(*found, strict=True)
                    rows.append(
                        {
                            "source": source.name,
                            "trained": source.trained,
                            "widths": _widths(source.layers),
                            "images": len(found),
                            "dtype": str(dtype).removeprefix("torch."),
                            "method": method,
                            "compute": compute,
                            "spearman_mean": round(sum(correlations) / len(found), 7),
                            "spearman_min": round(min(correlations), 7),
                            "kept_equal": round(sum(shares) / len(found), 5),
                        }
                    )
                    print(*rows[-1].values(), sep="\t", flush=True)
    return rows


@torch.inference_mode()
def _compared(
    source: Source, dtype: torch.dtype, estimator: str
) -> dict[str, list[tuple[float, float]]]:
    """Return rank correlation and share of equal kept tokens of every image, by precision.

    The reference is float64 from the model's own 16-bit weights and pre-activations. "float64"
    compares that with pre-activations in float64: what the model's rounding costs by itself.
    """
    model = copy.deepcopy(source.layers).to(dtype)
    wide = copy.deepcopy(model).double()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("float64", *COMPUTE)}
    for features in source.features:
        x = features.to(dtype)[None]
        hidden, z = model[0](x), model(x)
        want = sensitivity(wide, x.double(), estimator=estimator, hidden=hidden.double())
        unrounded = sensitivity(wide, x.double(), estimator=estimator)
        found["float64"].append(_agreement(want, unrounded, z))
        for compute in COMPUTE:
            got = sensitivity(model, x, estimator=estimator, compute=compute, hidden=hidden)
            found[compute].append(_agreement(got, want, z))
    return found


def _agreement(got: Tensor, want: Tensor, z: Tensor) -> tuple[float, float]:
    """Return Spearman's correlation of scores [1, N], and the share of equal tokens of KEEP."""
    ranks = torch.stack([scores[0].argsort().argsort().double() for scores in (got, want)])
    kept = [set(max_min(z, KEEP, weights=min_max(s))[0].tolist()) for s in (got, want)]
    return float(torch.corrcoef(ranks)[0, 1]), len(kept[0] & kept[1]) / KEEP


def _widths(layers: nn.Sequential) -> list[int]:
    return [layers[0].in_features, layers[0].out_features, layers[2].out_features]


def passing(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return which precisions reach what the default needs, on everything that is trained."""
    return {
        compute: all(
            row["spearman_mean"] >= LEAST_CORRELATION and row["kept_equal"] >= LEAST_SHARE
            for row in rows
            if row["trained"] and row["compute"] == compute
        )
        for compute in COMPUTE
    }


def section(result: dict[str, Any]) -> str:
    """Return the table of a result, as Markdown."""
    run = result["run"]
    versions, threads = run["versions"], run["machine"]["torch_threads"]
    lines = [
        [
            f"{row['source']}, {' x '.join(map(str, row['widths']))}",
            row["dtype"],
            row["method"],
            row["compute"],
            f"{row['spearman_mean']:.6f}",
            f"{row['spearman_min']:.6f}",
            f"{100 * row['kept_equal']:.1f} %",
        ]
        for row in result["rows"]
    ]
    header = ["weights and features", "model", "method", "compute", "Spearman", "lowest", "kept"]
    return (
        f"Made by `{run['command']}`, cpu with {threads} thread(s), torch {versions['torch']}, "
        f"commit {describe_commit(run['git'], 10)}.\n\n{table(header, lines, aligned=False)}"
    )


def pages(files: Sequence[Path], result: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield every file with its new text."""
    for file in files:
        yield file, fill_sections(file, {SECTION: section(result)})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save, and update documents."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(prog=PROGRAM, description="Compare scores of every precision.")
    parser.add_argument("--images", type=int, default=100, help="of llava-tiny's benchmark")
    parser.add_argument("--random-images", type=int, default=2, help="at LLaVA-1.5-7B's widths")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write a result file")
    parser.add_argument("--from-result", type=Path, metavar="FILE", help="measure nothing, read it")
    parser.add_argument("--update", type=Path, action="append", default=[], metavar="FILE")
    args = parser.parse_args(words)
    with one_line_errors(parser):
        run(args, shlex.join([*PROGRAM.split(), *words]))
    return 0


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, or read a result; print what passes, write the result file and the documents."""
    if args.from_result is not None:
        result = json.loads(args.from_result.read_text())
    else:
        if args.images < 1 or args.random_images < 0:
            raise ResultError("--images must be at least 1, --random-images at least 0")
        git = provenance.git_state()
        sources = trained_sources(args.images)
        if args.random_images:
            sources.append(random_source(args.random_images))
        rows = measure(sources)
        result = {
            "schema_version": SCHEMA_VERSION,
            "config": {
                "command": "compute-study",
                "keep": KEEP,
                "least_correlation": LEAST_CORRELATION,
                "least_share": LEAST_SHARE,
            },
            "run": {
                "command": command,
                "git": git,
                "versions": provenance.package_versions(),
                "machine": provenance.machine("cpu"),
            },
            "passing": passing(rows),
            "rows": rows,
        }
    print("passing:", result["passing"])
    if args.save_result:
        write_atomically(args.save_result, dump_json(result))
    for file, text in pages(args.update, result):
        write_atomically(file, text)


if __name__ == "__main__":
    sys.exit(main())
