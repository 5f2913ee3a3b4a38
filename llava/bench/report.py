"""Tables of a bench as Markdown, from its file alone."""

import re
from collections.abc import Sequence
from typing import Any

from llava.bench.arms import FREE
from llava.bench.rates import PRODUCT
from llava.bench.schema import THIS, BenchResult
from llava.bench.summary import ROWS, Figures, Spread, figures_of, spread
from llava.eval.engine.request import UNPRUNED
from llava.markdown import table

NONE = "—"
MIB = 2**20
# What others report, under conditions of their own: (what, figure, conditions, source).
PUBLISHED = (
    (
        "ZOO-Prune",
        "2.59x prefill, 2.30x end to end",
        "LLaVA-NeXT-7B, 160 tokens, POPE; GPU of the timing run not stated",
        "arXiv 2509.24837",
    ),
    (
        "DiffPrune",
        "2.85x prefill, pruner 0.69 ms",
        "LLaVA-1.5-7B, 64 of 576 tokens, one A6000, batch 1, fp16",
        "arXiv 2605.28051",
    ),
    (
        "DivPrune, an independent check",
        "slower than no pruning: 2.33 against 2.24 s, 5.00 against 4.24 s a sample",
        "LLaVA-1.5-7B, LLaVA-1.6-7B, FlashAttention, COCO",
        "github.com/Theia-4869/CDPruner/issues/1",
    ),
)


def render(result: BenchResult) -> str:
    """Return all tables of a bench."""
    figures = figures_of(result)
    parts = [describe(result)]
    conditions = result["conditions"]
    layers, depth = conditions["layers"], conditions["depth"]
    ran = "" if layers == depth else f" ({layers} of {depth} layers)"
    for batch in conditions["batches"]:
        own = [f for f in figures if f.arm["batch"] == batch]
        parts += [
            f"**Batch {batch}**: milliseconds, median of {len(own[0].arm['times']['encode'])}",
            _times(result, own),
            "Operations, bytes, memory, and bounds over times",
            _work(own, ran),
            "<details><summary>5th to 95th percentile: milliseconds and ratios</summary>",
            _percentiles(own, ran),
            "</details>",
            *against(own),
        ]
    return "\n\n".join([*parts, LEGEND, "Published by others, on other machines:", published()])


def describe(result: BenchResult, times: bool = True) -> str:
    """Return the conditions in words; without `times` not how long loading took."""
    conditions, rates, machine = result["conditions"], result["rates"], result["machine"]
    place = machine.get("gpu") or f"{conditions['device']} ({machine.get('torch_threads')} threads)"
    versions = result["versions"]
    images = f"{conditions['tiles']} tile(s) an image, {conditions['text']} tokens of text"
    products = ", ".join(
        f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items() if kind != "memory"
    )
    known = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    rows, inner, outer = PRODUCT.get(conditions["device"].partition(":")[0], PRODUCT["cpu"])
    lines = [
        f"{conditions['model']}, {conditions['weights']} weights, {conditions['dtype']}, {place}; "
        f"{images}; {', '.join([*known, _commit(result['commit'])])}.",
        f"One product of {rows} x {inner} x {outer} on this machine, in the same run: {products}; "
        f"memory: {rates['memory'] / 1e9:.3g} GB/s.",
        f"Made by `{result['command']}`.",
    ]
    if times:
        seconds = result["loading_seconds"][THIS]
        lines.append(f"The model was ready after {seconds:.3g} s, which is in no time below.")
    if conditions["layers"] != conditions["depth"]:
        lines.insert(
            1,
            f"**The language model ran with {conditions['layers']} of its {conditions['depth']} "
            "layers**: its times are scaled to all of them, and with the layers all else that is "
            "not the output layer (mask, rotary angles, last norm). The output layer is the median "
            "of its own times in all arms of a batch.",
        )
    for name, state in result.get("compared_with", {}).items():
        lines.append(f"{name} is {_commit(state)}.")
    if not result["complete"]:
        lines.append("**The run was interrupted: fewer repeats than asked for.**")
    return " ".join(lines)


def _commit(state: dict[str, Any] | None) -> str:
    """Return a commit in words."""
    if state is None:
        return "of no known commit"
    changed = " with changes that are not committed" if state.get("dirty") else ""
    return f"commit {str(state['commit'])[:10]}{changed}"


LEGEND = """\
*free*: the indices are given, so the arm only gathers; no method can be faster. *select*: the
rest of the stage after scoring, gather included. *splice*: all else between pixels and
embeddings. *between*: scoring, selecting and gathering between layers of the language model, on
CUDA by events; *prefill* is without it. The tokens of such arms are the mean over layers, then
what the first and the last one read; their KV cache is measured. *floor n*: not measured, because
n is the lowest mean that the schedule reaches on this model. *total n*: from pixels to the n-th
token of an answer; a decoding step is the mean of the first ones (at most 8), also where answers
are longer. *x prefill*: from features to the first token (stage, splice, between, prefill), the
unpruned model's time over that of the arm; *x total
n*: the same of totals; both are taken within a repeat. *of free*: from features to the first token,
the free arm's time over that of an arm that keeps as many tokens; *allowed*: the same if the stage
ran at its bound; *of free total*: of totals at the shortest answer. In these three and in *pays up
to* the language model's time is one median over all arms that feed it as many tokens, so their
percentiles show the noise of the stage alone. *pays up to*: the most tokens of an image that the
method may keep and still give that answer no later than the unpruned model, if every removed token
saves as much and the method costs the same whatever it keeps. *bound*: operations at the rate of
one product of their type, or bytes (weights and inputs once, results once) at that of memory,
whichever takes longer; the columns show bound over time. Stages run again and again on tokens that
may lie in a cache. *peak*: the most that a whole call held beyond weights and inputs, on CUDA.
*operators*: what torch runs in the stage; on CUDA what it would run there without kernels. *first
call*: what the first call of the stage took beyond later ones: for the first arm of a method, what
is computed once a model, and compilation."""


def published() -> str:
    """Return the table of what others report."""
    return table(("method", "reported", "conditions", "source"), PUBLISHED, aligned=False)


def arm_name(figures: Figures) -> str:
    """Return what tables call an arm."""
    arm = figures.arm
    name = arm["arm"]
    if arm["label"] != arm["method"]:  # it says what the method could not read, and no options
        name = arm["label"] + name.removeprefix(re.split("[:@+]", arm["method"])[0])
    return name if arm["source"] == THIS else f"{name} ({arm['source']})"


def _times(result: BenchResult, figures: Sequence[Figures]) -> str:
    answers = result["conditions"]["answers"]
    shortest = min(answers)
    steps = [step for step in ROWS if any(step in f.rows for f in figures)]
    header = ["arm", "tokens", *steps, *(f"total {n}" for n in answers), "x prefill"]
    header += [*(f"x total {n}" for n in answers), "of free", "allowed", "of free total"]
    lines = []
    for own in figures:
        line = [arm_name(own), tokens_of(own)]
        line += [_ms(own.rows.get(step)) for step in steps]
        line += [_ms(own.totals[n]) for n in answers]
        line.append(f"{own.prefill_speed_up.median:.2f}")
        line += [f"{own.speed_up[n].median:.2f}" for n in answers]
        if own.of_free_prefill is None or own.arm["free"]:
            line += [NONE] * 4
        else:
            shares = own.of_free_prefill.median, own.allowed or 0.0, own.of_free[shortest].median
            line += [*(f"{100 * share:.1f} %" for share in shares), pays(own.pays_up_to)]
        lines.append(line)
    header.append("pays up to")
    return table(header, lines + floor_lines(result, len(header)))


def floor_lines(result: BenchResult, columns: int) -> list[list[str]]:
    """Return lines of arms that were not measured: `fastv@64 | floor 288`."""
    floors = result.get("floors", {})
    return [[arm, f"floor {floor}", *[NONE] * (columns - 2)] for arm, floor in floors.items()]


def tokens_of(figures: Figures) -> str:
    """Return the cell of tokens: the mean, first and last of layers where they differ."""
    counts = figures.arm.get("layer_tokens")
    if counts is None:
        return str(figures.arm["tokens"])
    return f"{sum(counts) / len(counts):.1f} ({counts[0]} to {counts[-1]})"


def pays(tokens: float | None) -> str:
    """Return the cell of "pays up to"."""
    if tokens is None:
        return NONE
    return f"{tokens:.0f}" if tokens >= 1 else "never"


def _work(figures: Sequence[Figures], ran: str) -> str:
    parts = ("encode", "stage", "prefill", "decode")
    header = ["arm"]
    for part in parts:
        header += [f"{part} GFLOP", f"{part} MB", f"{part} bound"]
    header += ["KV cache MiB", f"peak MiB{ran}", "operators", "first call ms"]
    lines = []
    for own in figures:
        line = [arm_name(own)]
        for part in parts:
            work, spent = own.arm["work"][part], _spent(own, part)
            share = f"{100 * own.bounds[part] / spent:.0f} %" if spent and work["bytes"] else NONE
            line += [
                f"{sum(work['flops'].values()) / 1e9:.4g}",
                f"{work['bytes'] / 1e6:.4g}",
                share,
            ]
        peaks = own.arm["times"].get("peak_bytes")
        launches = own.arm["work"]["stage"]["launches"]
        line += [
            f"{own.arm['kv_cache_bytes'] / MIB:.4g}",
            f"{max(peaks) / MIB:.4g}" if peaks else NONE,
            str(launches) if own.arm["method"] not in (UNPRUNED, FREE) else NONE,
            f"{own.one_time_ms:.3g}" if own.arm["method"] not in (UNPRUNED, FREE) else NONE,
        ]
        lines.append(line)
    return table(header, lines)


def _spent(figures: Figures, part: str) -> float | None:
    """Return the median ms of a part that is counted."""
    if part == "stage":
        return figures.rows["score"].median + figures.rows["select"].median
    return figures.rows[part].median if part in figures.rows else None


def _percentiles(figures: Sequence[Figures], ran: str) -> str:
    answers = list(figures[0].totals)
    steps = [step for step in ROWS if any(step in f.rows for f in figures)]
    lines = [
        [
            arm_name(own),
            *(_range(own.rows.get(step)) for step in steps),
            *(_range(own.totals[n]) for n in answers),
            _range(spread(own.arm["times"]["end_to_end"])),
            _range(own.prefill_speed_up),
            _range(own.of_free_prefill),
        ]
        for own in figures
    ]
    return table(
        [
            "arm",
            *steps,
            *(f"total {n}" for n in answers),
            f"as one call{ran}",
            "x prefill",
            "of free",
        ],
        lines,
    )


def against(figures: Sequence[Figures], times: bool = True) -> list[str]:
    """Return a heading and a table for each other checkout: what this tree changed in every arm.

    Without `times` of stages only their ratio.
    """
    parts = []
    for source in dict.fromkeys(f.arm["source"] for f in figures if f.arm["source"] != THIS):
        before = {f.arm["arm"]: f for f in figures if f.arm["source"] == source}
        lines = [
            _change(before[own.arm["arm"]], own, times)
            for own in figures
            if own.arm["source"] == THIS and own.arm["method"] != UNPRUNED
        ]
        header = ["arm", *(("stage ms there", "stage ms here") if times else ()), "stage ratio"]
        for name in ("x prefill", "of free"):
            header += [f"{name} there", f"{name} here", "ratio"]
        parts += [
            f"Against {source}: medians there and here; a ratio above 1: better here",
            table(header, lines),
        ]
    return parts


def _change(before: Figures, own: Figures, times: bool) -> list[str]:
    """Return a line of `against`."""
    there, here = _spent(before, "stage") or 0.0, _spent(own, "stage") or 0.0
    cells = [arm_name(own), *((_digits(there), _digits(here)) if times else ())]
    cells.append(f"{there / here:.2f}" if here else NONE)
    whole = len(cells) + 6
    pairs: list[tuple[Spread | None, Spread | None]] = [
        (before.prefill_speed_up, own.prefill_speed_up)
    ]
    if not own.arm["free"]:
        pairs.append((before.of_free_prefill, own.of_free_prefill))
    for first, second in pairs:
        if first is None or second is None:
            continue
        cells += [f"{first.median:.3f}", f"{second.median:.3f}"]
        cells.append(f"{second.median / first.median:.2f}")
    return cells + [NONE] * (whole - len(cells))


def _ms(value: Spread | None) -> str:
    return NONE if value is None else _digits(value.median)


def _range(value: Spread | None) -> str:
    return NONE if value is None else f"{_digits(value.low)}..{_digits(value.high)}"


def _digits(value: Any) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
