"""Tables of a bench for documents: ratios alone, because a CPU's times say little elsewhere."""

from collections.abc import Sequence

from llava.bench.report import NONE, against, arm_name, describe, pays
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
            _ratios(own),
            *against(own, times=False),
        ]
    return "\n\n".join(parts)


def _ratios(figures: Sequence[Figures]) -> str:
    unpruned = {f.arm["source"]: f for f in figures if f.arm["method"] == UNPRUNED}
    header = ["arm", "tokens", "score", "select", "stage bound", "one-time", "x prefill"]
    lines = []
    for own in figures:
        if own.arm["method"] == UNPRUNED:
            continue
        whole = unpruned[own.arm["source"]].rows["prefill"].median
        score, select = own.rows["score"].median, own.rows["select"].median
        shares = (score, select, own.bounds["stage"], own.one_time_ms)
        line = [arm_name(own), str(own.arm["tokens"])]
        line += [f"{100 * ms / whole:.2f} %" for ms in shares]
        line.append(f"{own.prefill_speed_up.median:.2f}")
        if own.of_free_prefill is None or own.arm["free"]:
            line += [NONE] * 3
        else:
            beside = own.of_free_prefill.median, own.allowed or 0.0
            line += [*(f"{100 * share:.1f} %" for share in beside), pays(own.pays_up_to)]
        lines.append(line)
    return table([*header, "of free", "allowed", "pays up to"], lines)
