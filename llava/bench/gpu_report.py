"""Tables of `gpu.json`, which `scripts/gpu.sh` writes, from the file alone."""

from pathlib import Path
from typing import Any

from llava.bench.report import render
from llava.bench.scaling import render_scaling
from llava.bench.schema import GpuResult, check_result
from llava.markdown import table
from llava.utils import UserInputError

STAGE = "stage alone"
# ms that the stage may take on an H100 or H200: by method, tokens and budget.
TARGETS = {
    ("zoo-exact", 576, 64): 0.3,
    ("zoo-exact", 576, 192): 0.4,
    ("zoo-exact", 2880, 160): 1.0,
    ("zoo-exact", 2880, 320): 1.0,
    ("zoo-exact", 2880, 640): 1.0,
}
# Parts whose results are files of `llava bench`, by the kind of these.
_TABLES: dict[str, Any] = {"bench": render, "scaling": render_scaling}


def render_gpu(result: GpuResult) -> str:
    """Return the tables of the stage, the benches and the sizes, and the one of all parts."""
    blocks = []
    for part in result["parts"]:
        found = part.get("result")
        if part["name"] == STAGE and found:
            blocks.append(_stage_table(found))
        elif isinstance(found, dict) and found.get("kind") in _TABLES:
            blocks.append(_TABLES[found["kind"]](check_result(found, part["name"])))
    lines = [[p["name"], p["status"], f"{p['seconds']:g}", p["line"]] for p in result["parts"]]
    card = result["machine"].get("gpu", "a CPU: nothing here is a measurement")
    parts = table(["part", "status", "seconds", "result"], lines, aligned=False)
    return "\n\n".join([*blocks, f"On {card}:", parts])


def find_part(result: Any, name: str, file: Path) -> Any:
    """Return what was found in one part: of `llava bench`, or the rows of the stage with the run's.

    Raises:
        UserInputError: there is no such part, or nothing was found in it.
    """
    parts = result["parts"] if result["kind"] == "gpu" else []
    found = {
        part["name"]: part["result"]
        for part in parts
        if isinstance(part.get("result"), dict) and part["result"].get("kind") in _TABLES
    }
    stages = [part["result"] for part in parts if part["name"] == STAGE and part.get("result")]
    known = [*found, *(STAGE for _ in stages)]
    if name not in known:
        listed = ", ".join(map(repr, known)) or "none"
        raise UserInputError(f"--part {name!r}: parts of {file} that can be shown alone: {listed}")
    if name == STAGE:
        return {**result, "kind": "stage", "rows": stages[0]}
    return check_result(found[name], f"{name} of {file}")


def render_stage(result: Any) -> str:
    """Return the table of the part "stage alone" of a run, see `find_part`, and its conditions."""
    versions, commit = result["versions"], (result["commit"] or {}).get("commit")
    card = result["machine"].get("gpu", "a CPU: nothing here is a measurement")
    return "\n".join(
        [
            f"One image, random tokens and projector of LLaVA-1.5-7B's widths, {card}; torch "
            f"{versions['torch']}, transformers {versions['transformers']}, commit {commit}.",
            "",
            _stage_table(result["rows"]),
        ]
    )


def _stage_table(rows: list[dict[str, Any]]) -> str:
    header = ["method", "tokens", "median ms", "p5 to p95", "CUDA graph ms", "target ms"]
    header += ["waits", "peak MiB", "first call ms"]
    return table(header, [_stage_line(row) for row in rows])


def _stage_line(row: dict[str, Any]) -> list[str]:
    target = TARGETS.get((row["method"], row["tokens"], row["keep"]))
    peak = row.get("peak_bytes")
    return [
        row["method"],
        f"{row['tokens']} → {row['keep']}",
        f"{row['median_ms']:.2f}",
        f"{row['p5_ms']:.2f} to {row['p95_ms']:.2f}",
        _or_dash(row.get("graph_ms"), ".2f"),
        _or_dash(target, "g"),
        _or_dash(row["waits"], "d"),
        _or_dash(None if peak is None else peak / 2**20, ".1f"),
        f"{row['first_ms']:.1f}",
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
