"""Tables of `gpu.json`, which `scripts/gpu.sh` writes, from the file alone."""

import json
from pathlib import Path
from typing import Any

from llava.bench.report import render
from llava.bench.scaling import render_scaling
from llava.bench.schema import GpuResult, check_result
from llava.markdown import table
from llava.utils import UserInputError

STAGE = "stage alone"
# Parts whose results are files of `llava bench`, by the kind of these.
_TABLES: dict[str, Any] = {"bench": render, "scaling": render_scaling}


def render_gpu(result: GpuResult) -> str:
    """Return the tables of the stage, the benches and the sizes, and the one of all parts."""
    blocks = []
    for part in result["parts"]:
        found = part.get("result")
        if part["name"] == STAGE and found:
            blocks.append(_stage(found))
        elif isinstance(found, dict) and found.get("kind") in _TABLES:
            blocks.append(_TABLES[found["kind"]](check_result(found, part["name"])))
    lines = [[p["name"], p["status"], f"{p['seconds']:g}", p["line"]] for p in result["parts"]]
    card = result["machine"].get("gpu", "a CPU: nothing here is a measurement")
    parts = table(["part", "status", "seconds", "result"], lines, aligned=False)
    return "\n\n".join([*blocks, f"On {card}:", parts])


def find_part(result: Any, name: str, file: Path) -> Any:
    """Return what `llava bench` found in one part.

    Raises:
        UserInputError: there is no such part, or nothing was found in it.
    """
    parts = result["parts"] if result["kind"] == "gpu" else []
    found = {
        part["name"]: part["result"]
        for part in parts
        if isinstance(part.get("result"), dict) and part["result"].get("kind") in _TABLES
    }
    if name not in found:
        known = ", ".join(map(repr, found)) or "none"
        raise UserInputError(f"--part {name!r}: parts of {file} that can be shown alone: {known}")
    return check_result(found[name], f"{name} of {file}")


def _stage(rows: list[dict[str, Any]]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    return table(header, [[json.dumps(row.get(key)).strip('"') for key in header] for row in rows])
