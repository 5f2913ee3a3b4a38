"""`python -m llava.eval selection-speed`: selection rules side by side with how they are published.

Both arms start from the same cosine similarities, whose matrix product is timed by itself: it costs
the same whatever picks afterwards. Every picked index has to agree, or there is no result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.eval import provenance
from llava.eval.results import SCHEMA_VERSION, ResultError, dump_json, write_atomically
from llava.pruning import list_methods
from llava.pruning.selection.max_min import cosine, distances_of, first_score, greedy
from llava.pruning.selection.topk import top_k

BUDGETS = {576: (64, 128, 192), 2880: (160, 320, 640)}
WIDTH = 4096


# (similarity [N, N], which it may overwrite, weights [N], k) -> indices [k] in the order of picks.
Selection = Callable[[Tensor, Tensor, int], Tensor]


class Rule(NamedTuple):
    """A way to pick, ours and the published one, and the registered methods that pick so."""

    ours: Selection
    baseline: Selection
    methods: tuple[str, ...]


def isolated(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """`max_min(first="isolated")` without weights, after its matrix product."""
    return _max_min(similarity, None, k, "isolated")


def weighted(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """`max_min` with weights, after its matrix product."""
    return _max_min(similarity, weights[None], k, "importance")


def _max_min(similarity: Tensor, weights: Tensor | None, k: int, first: str) -> Tensor:
    distances = distances_of([similarity])
    tokens = torch.arange(len(similarity))[None]
    score = first_score(distances, weights, tokens, first)
    nothing = torch.zeros_like(score, dtype=torch.bool)
    return greedy(distances, weights, score, nothing, k, "multiply")[0][0]


def published_isolated(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """DivPrune's rule: every step gathers the rows of all picks again and reduces them.

    The first pick, a token's second-smallest distance in the released code, is made by the cheaper
    minimum beside the diagonal, so that a ratio is owed to the steps alone.
    """
    distances = torch.sub(torch.ones(()), similarity, out=similarity)
    lonely = distances.fill_diagonal_(2.0).amin(dim=0)
    return _regather(distances.fill_diagonal_(0.0), None, lonely.argmax(), k)


def published_weighted(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """ZOO-Prune's algorithm 1 step by step: max over the similarities to all picks, every time."""
    distances = torch.sub(torch.ones(()), similarity, out=similarity)
    return _regather(distances, weights, weights.argmax(), k)


def _regather(distances: Tensor, weights: Tensor | None, first: Tensor, k: int) -> Tensor:
    picks = torch.empty(k, dtype=torch.long)
    picks[0] = first
    for count in range(1, k):
        score = distances.index_select(0, picks[:count]).amin(dim=0)
        picks[count] = (score if weights is None else weights * score).argmax()
    return picks


RULES = {
    "max-min, most isolated first": Rule(isolated, published_isolated, ("divprune",)),
    "max-min, weighted": Rule(weighted, published_weighted, ("norm", "zoo", "zoo-exact")),
    "top-k": Rule(
        lambda similarity, weights, k: top_k(weights[None], k).indices[0],
        lambda similarity, weights, k: torch.topk(weights, k).indices,
        ("least-sensitive",),
    ),
}


@torch.no_grad()
def measure(budgets: dict[int, tuple[int, ...]], width: int, repeats: int) -> list[dict[str, Any]]:
    """One row per rule, N and k: medians in milliseconds, and the median of paired ratios.

    `ratio` is baseline over ours: above 1, ours is faster. Raises ResultError where picks differ.
    """
    rows = []
    for count, keeps in budgets.items():
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randn(count, width, generator=generator)
        weights = torch.rand(count, generator=generator)
        similarity = cosine(tokens)
        product = [_timed(lambda z=tokens: cosine(z))[0] for _ in range(repeats)]
        for name, rule in RULES.items():
            for keep in keeps:
                given = similarity, weights, keep
                # The first pair is the warm-up.
                pairs = [
                    (_run(rule.ours, *given), _run(rule.baseline, *given))
                    for _ in range(repeats + 1)
                ]
                if any(not torch.equal(ours[1], base[1]) for ours, base in pairs):
                    raise ResultError(f"{name}, N = {count}, k = {keep}: the picks differ")
                times = [(ours[0], base[0]) for ours, base in pairs[1:]]
                rows.append(
                    {
                        "rule": name,
                        "methods": list(rule.methods),
                        "tokens": count,
                        "keep": keep,
                        "similarity_ms": round(statistics.median(product), 3),
                        "ours_ms": round(statistics.median(ours for ours, _ in times), 3),
                        "baseline_ms": round(statistics.median(base for _, base in times), 3),
                        "ratio": round(statistics.median(b / a for a, b in times), 3),
                        "picks_equal": True,
                    }
                )
    return rows


def _run(rule: Selection, similarity: Tensor, weights: Tensor, k: int) -> tuple[float, Tensor]:
    """Milliseconds and picks. Arms may overwrite what the product made, so each gets a copy."""
    own = similarity.clone()
    return _timed(lambda: rule(own, weights, k))


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU milliseconds of this process, so that other programs do not count, and the result."""
    start = time.process_time()
    result = call()
    return 1000 * (time.process_time() - start), result


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `selection-speed` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser(
        "selection-speed", help="time selection rules side by side with the published ones (CPU)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed pairs of every case")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write a result file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and save."""
    if args.repeats < 1:
        raise ResultError(f"--repeats must be at least 1, got {args.repeats}")
    torch.set_num_threads(1)
    git, load = provenance.git_state(), os.getloadavg()
    rows = measure(BUDGETS, WIDTH, args.repeats)
    for row in rows:
        print(
            f"{row['rule']:<30} N {row['tokens']:>4}  k {row['keep']:>3}  product "
            f"{row['similarity_ms']:>8.1f} ms  ours {row['ours_ms']:>7.2f} ms  published "
            f"{row['baseline_ms']:>8.2f} ms  {row['ratio']:>5.2f} times as fast"
        )
    covered = {method for rule in RULES.values() for method in rule.methods}
    result = {
        "schema_version": SCHEMA_VERSION,
        "config": {
            "command": "selection-speed",
            "width": WIDTH,
            "repeats": args.repeats,
            "clock": "process CPU time, one thread",
        },
        "run": {
            "command": args.command_line,
            "git": git,
            "versions": provenance.package_versions(),
            "machine": provenance.machine("cpu"),
            # Other programs' share of the machine: a minute's load average before and after.
            "load_average": [round(load[0], 2), round(os.getloadavg()[0], 2)],
        },
        "without_baseline": [name for name in list_methods() if name not in covered],
        "rows": rows,
    }
    if args.save_result:
        write_atomically(args.save_result, dump_json(result))
    return 0
