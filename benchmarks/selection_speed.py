"""Time selection rules next to the published ones: `python benchmarks/selection_speed.py`.

Both start from the same cosine similarities, whose matrix product is timed by itself, because it
costs the same for every rule. If one picked index differs, there is no result.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.engine import provenance
from llava.eval.engine.schema import SCHEMA_VERSION, ResultError
from llava.pruning import list_methods
from llava.pruning.methods.hiprune import HiPrune
from llava.pruning.methods.scope import Scope
from llava.pruning.methods.vispruner import drop_duplicates
from llava.pruning.selection.coverage import cover
from llava.pruning.selection.dpp import greedy_map
from llava.pruning.selection.max_min import cosine, distances_of, first_score, greedy
from llava.pruning.selection.rows import ranking, top_k
from llava.storage import dump_json, write_atomically

PROGRAM = "python benchmarks/selection_speed.py"
BUDGETS = {576: (64, 128, 192), 2880: (160, 320, 640)}
WIDTH = 4096
SECONDS = 30  # for the pairs of one case


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
    score = first_score(weights, tokens, None, first, distances)
    return greedy(distances, weights, score, None, k, "multiply")[0][0]


def published_isolated(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """DivPrune's rule: every step gathers the rows of all picks again and reduces them.

    The first pick, a token's second-smallest distance in the released code, is made by the cheaper
    minimum next to the diagonal, so that a ratio is due to the steps alone.
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


def published_weighted_isolated(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """Cen-Prune's rule on DivPrune: its first pick, then distinctiveness times distance."""
    distances = torch.sub(torch.ones(()), similarity, out=similarity)
    lonely = distances.fill_diagonal_(2.0).amin(dim=0)
    return _regather(distances.fill_diagonal_(0.0), weights, lonely.argmax(), k)


def published_top_k(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """FasterVLM's rule: top-k, then raster order by a mask."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    return mask.scatter_(0, torch.topk(weights, k).indices, True).nonzero()[:, 0]


def published_determinant(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """CDPruner's loop, without any guard."""
    kernel = weights[:, None] * similarity * weights
    left, factor = kernel.diagonal().clone(), torch.zeros(k, len(kernel))
    picks = torch.empty(k, dtype=torch.long)
    for step in range(k):
        pick = left.argmax()
        row = kernel[pick] - factor[:step, pick] @ factor[:step]
        factor[step] = row / left[pick].sqrt()
        left -= factor[step].square()
        left[pick] = -torch.inf
        picks[step] = pick
    return picks


def published_coverage(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """MMTok's loop: what every candidate would add to the best cover of every row."""
    best, picks = torch.zeros(len(similarity), 1), torch.empty(k, dtype=torch.long)
    similarity = similarity.abs_()
    for step in range(k):
        gain = (similarity - best).clamp_min(0).sum(dim=0)
        gain[picks[:step]] = -torch.inf
        picks[step] = gain.argmax()
        best = torch.maximum(best, similarity[:, picks[step], None])
    return picks


def published_scope(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """SCOPE's loop: coverage gain times saliency."""
    covered, picks = torch.zeros(len(similarity)), torch.empty(k, dtype=torch.long)
    for step in range(k):
        score = (similarity - covered).clamp_min(0).sum(dim=1) * weights
        score[picks[:step]] = -torch.inf
        picks[step] = score.argmax()
        covered = torch.maximum(covered, similarity[picks[step]])
    return picks


def duplicates_removed(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """`vispruner` after its matrix product: tokens in their order, a few important ones first."""
    half = k // 2
    order = ranking(weights[None])[0]
    rest = order[half:]
    stay = drop_duplicates(similarity.index_select(0, rest).index_select(1, rest), k - half)
    return torch.cat([order[:half], rest[stay]])


def published_duplicates(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """VisPruner's rounds: drop the duplicates of every other token, eight at a time."""
    half = k // 2
    order = weights.argsort(descending=True, stable=True)
    residual = order[half:]
    while len(residual) > k - half:
        drop = min(8, len(residual) - (k - half))
        a, b = residual[::2], residual[1::2]
        order_of_a = similarity[a][:, b].amax(dim=1).argsort(descending=True, stable=True)
        residual = torch.cat([a[order_of_a[drop:]], b])
    return torch.cat([order[:half], residual])


def anchored(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """`hiprune` with the released code's neighbours, on a grid 24 wide; in raster order."""
    tokens, grid = torch.arange(len(weights)), (len(weights) // 24, 24)
    return HiPrune(wrap_neighbours=True).choose(weights.flip(0), weights, tokens, k, grid).sort()[0]


def published_anchored(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """HiPrune's rule: anchors and their clamped neighbours, then the highest of the rest."""
    anchors = torch.topk(weights.flip(0), round(k * 0.1 / 5)).indices
    near = anchors[:, None] + torch.tensor([0, -1, 1, -24, 24])
    taken = near.clamp_(0, len(weights) - 1).unique()
    rest = weights.clone()
    rest[taken] -= 1
    more = torch.topk(rest, k - len(taken)).indices
    return torch.cat([taken, more]).sort().values


RULES = {
    "max-min, most isolated first": Rule(isolated, published_isolated, ("divprune",)),
    "max-min, weighted": Rule(weighted, published_weighted, ("norm", "zoo", "zoo-exact")),
    "max-min, isolated, then weighted": Rule(
        lambda similarity, weights, k: _max_min(similarity, weights[None], k, "isolated"),
        published_weighted_isolated,
        ("cen-prune",),
    ),
    "determinant": Rule(
        lambda similarity, weights, k: greedy_map(similarity, weights, k).indices,
        published_determinant,
        ("cdpruner",),
    ),
    "coverage": Rule(
        lambda similarity, weights, k: cover(similarity.abs_(), k).indices,
        published_coverage,
        ("mmtok",),
    ),
    "coverage x saliency": Rule(
        lambda similarity, weights, k: Scope().cover(similarity, weights, k).indices,
        published_scope,
        ("scope",),
    ),
    "duplicates removed": Rule(duplicates_removed, published_duplicates, ("vispruner",)),
    "anchors, neighbours, top-k": Rule(anchored, published_anchored, ("hiprune",)),
    "top-k": Rule(
        lambda similarity, weights, k: top_k(weights[None], k).indices[0],
        published_top_k,
        ("fastervlm", "fopru", "least-sensitive"),
    ),
}


@torch.no_grad()
def measure(budgets: dict[int, tuple[int, ...]], width: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per rule, N and k: medians in milliseconds, and the median of paired ratios.

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
                pairs = _pairs(rule, given, repeats)
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
                        "pairs": len(times),
                        "picks_equal": True,
                    }
                )
    return rows


def _pairs(
    rule: Rule, given: tuple[Tensor, Tensor, int], repeats: int
) -> list[tuple[tuple[float, Tensor], tuple[float, Tensor]]]:
    """Run both arms in turn, `repeats` times after the first pair, the warm-up.

    Rules that take seconds stop after SECONDS, but never before one pair after the warm-up.
    """
    start, pairs = time.monotonic(), []
    while len(pairs) < repeats + 1:
        pairs.append((_run(rule.ours, *given), _run(rule.baseline, *given)))
        if len(pairs) > 1 and time.monotonic() - start > SECONDS:
            break
    return pairs


def _run(rule: Selection, similarity: Tensor, weights: Tensor, k: int) -> tuple[float, Tensor]:
    """Return milliseconds and picks. Arms may overwrite the similarities, so each gets a copy."""
    own = similarity.clone()
    return _timed(lambda: rule(own, weights, k))


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return CPU milliseconds, which other programs do not change, and the result."""
    start = time.process_time()
    result = call()
    return 1000 * (time.process_time() - start), result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and save."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(prog=PROGRAM, description="Time selection next to the published rules.")
    parser.add_argument("--repeats", type=int, default=9, help="timed pairs of every case")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write a result file")
    args = parser.parse_args(words)
    with one_line_errors(parser):
        run(args, shlex.join([*PROGRAM.split(), *words]))
    return 0


def run(args: argparse.Namespace, command: str) -> None:
    """Measure every rule, print a line for each case, and write the result file if one is asked."""
    if args.repeats < 1:
        raise ResultError(f"--repeats must be at least 1, got {args.repeats}")
    torch.set_num_threads(1)
    git, load = provenance.git_state(), os.getloadavg()
    rows = measure(BUDGETS, WIDTH, args.repeats)
    for row in rows:
        print(
            f"{row['rule']:<33} N {row['tokens']:>4}  k {row['keep']:>3}  product "
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
            "command": command,
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


if __name__ == "__main__":
    sys.exit(main())
