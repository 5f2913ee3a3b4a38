"""Tables of a bench for documents: ratios alone, because a CPU's times say little elsewhere."""

from collections.abc import Sequence

from llava.bench.report import NONE, against, arm_name, describe, floor_lines, pays, tokens_of
from llava.bench.schema import BenchResult
from llava.bench.summary import Figures, figures_of
from llava.eval.engine.request import UNPRUNED
from llava.markdown import table


def render_ratios(result: BenchResult) -> str:
    """Return the tables of a bench with every time as a share of the unpruned model's prefill."""
    parts = [describe(result, times=False)]
    for batch in result["conditions"]["batches"]:
        own = [f for f in figures_of(result) if f.arm["batch"] == batch]
        repeats = len(own[0].arm["times"]["encode"])
        parts += [
            f"**Batch {batch}**: medians of {repeats}",
            _ratios(result, own),
            *against(own, times=False),
        ]
    return "\n\n".join(parts)


def _inside(own: Figures, unpruned: Figures) -> list[str]:
    """Return cells of the language model as shares of the unpruned model's.

    They are what cutting between layers takes of its prefill, a decoding step, and the cache.
    """
    cells = [NONE, NONE]
    if "between" in own.rows:
        cells[0] = f"{100 * own.rows['between'].median / unpruned.rows['prefill'].median:.2f} %"
    if "decode" in own.rows:
        cells[1] = f"{100 * own.rows['decode'].median / unpruned.rows['decode'].median:.1f} %"
    cache = own.arm["kv_cache_bytes"] / unpruned.arm["kv_cache_bytes"]
    return [*cells, f"{100 * cache:.1f} %"]


def _ratios(result: BenchResult, figures: Sequence[Figures]) -> str:
    unpruned = {f.arm["source"]: f for f in figures if f.arm["method"] == UNPRUNED}
    deep = any("layer_tokens" in f.arm for f in figures)
    inside = ("between", "decode", "KV cache") if deep else ()
    header = ["arm", "tokens", "score", "select", *inside, "stage bound", "one-time", "x prefill"]
    lines = []
    for own in figures:
        if own.arm["method"] == UNPRUNED:
            continue
        base = unpruned[own.arm["source"]]
        whole = base.rows["prefill"].median
        score, select = own.rows["score"].median, own.rows["select"].median
        line = [arm_name(own), tokens_of(own)]
        line += [f"{100 * ms / whole:.2f} %" for ms in (score, select)]
        if deep:
            line += _inside(own, base)
        line += [f"{100 * ms / whole:.2f} %" for ms in (own.bounds["stage"], own.one_time_ms)]
        line.append(f"{own.prefill_speed_up.median:.2f}")
        if own.of_free_prefill is None or own.arm["free"]:
            line += [NONE] * 3
        else:
            beside = own.of_free_prefill.median, own.allowed or 0.0
            line += [*(f"{100 * share:.1f} %" for share in beside), pays(own.pays_up_to)]
        lines.append(line)
    header += ["of free", "allowed", "pays up to"]
    return table(header, lines + floor_lines(result, len(header)))
