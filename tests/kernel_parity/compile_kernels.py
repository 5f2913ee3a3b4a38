"""Compile every kernel at real sizes, without a GPU, and print what each needs as JSON.

A program of its own: it must not run in the interpreter, in which tests run where there is no GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava.pruning.kernels import dpp, max_min, normalise, quadratic
from llava.pruning.kernels.reductions import warps

SIZES = (576, 2880, 11_520, 16_384)
# Sizes that are multiples of 16 at LLaVA's shapes, which triton is told as it would find out.
ALIGNED = ("size", "hidden", "rows")
SELECTION = {"counts": "*i64", "indices": "*i64", "margins": "*fp32", "valid": "*i1"}


def jobs() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name -> kernel, types of arguments, constants, options of the compiler."""
    made = {}
    for size in SIZES:
        block = triton.next_power_of_2(size)
        options = {"num_warps": warps(block), "num_stages": 1, "enable_fp_fusion": False}
        numbers = {"size": "i32", "width": "i32"}
        types = {**dict.fromkeys(("gram", "scale", "weights", "score"), "*fp32"), **SELECTION}
        constants = {"ADDS": False, "BLOCK": block}
        made[f"max-min {size}"] = (max_min._pick_rows, {**types, **numbers}, constants, options)
        types = {**dict.fromkeys(("similarity", "quality", "factor"), "*fp32"), **SELECTION}
        constants = {"BLOCK": block, "CHUNK": dpp.chunk(block)}
        numbers["spent"] = "fp32"
        made[f"dpp {size}"] = (dpp._pick_rows, {**types, **numbers}, constants, options)
        types = {
            "scores": "*fp32",
            "valid": "*i1",
            "weights": "*fp32",
            "size": "i32",
            "flat": "fp32",
        }
        made[f"normalise {size}"] = (normalise._min_max, types, {"BLOCK": block}, options)
    # The shortest signature that `zoo-exact` and `divprune` use.
    types = {**dict.fromkeys(("gram", "score"), "*fp32"), **SELECTION, "size": "i32"}
    constants = {"scale": None, "weights": None, "ADDS": False, "BLOCK": 1024}
    types["width"] = types.pop("width", "i32")
    made["max-min bare"] = (max_min._pick_rows, types, constants, {"num_warps": 4})
    for dtype in ("bf16", "fp16", "fp32"):
        kernels = {"d": f"*{dtype}", "u": f"*{dtype}", "partial": "*fp32"}
        sizes = {"rows": "i32", "hidden": "i32"}
        shape = dict(
            zip(("ROWS", "COLUMNS", "DEPTH"), quadratic.tiles(dtype == "fp32"), strict=True)
        )
        options = {"num_warps": 4, "num_stages": 3}
        made[f"triangle {dtype}"] = (quadratic._triangle, {**kernels, **sizes}, shape, options)
        for kind in ("gelu", "gelu_tanh", "silu", "relu"):
            types = dict.fromkeys(("centre", "slope", "linear"), "*fp32")
            types |= {"hidden": "*bf16", "made": f"*{dtype}", "width": "i32"}
            constants = {"KIND": kind, "BLOCK": 1024}
            made[f"{kind} {dtype}"] = (quadratic._derivative, types, constants, {"num_warps": 4})
    types = dict.fromkeys(("partial", "linear", "constant", "scores"), "*fp32")
    types |= {"rows": "i32", "blocks": "i32", "width": "i32"}
    made["join"] = (quadratic._join, types, {"BLOCK": 128}, {"num_warps": 4})
    types = {"scores": "*fp32", "weights": "*fp32", "size": "i32", "flat": "fp32"}
    constants = {"valid": None, "BLOCK": 1024}
    made["min-max"] = (normalise._min_max, types, constants, {"num_warps": 4})
    return made


def build(kernel: Any, types: dict, constants: dict, options: dict, capability: int) -> dict:
    """Compile one kernel; return registers, bytes of stack (spills) and of shared memory."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    needs = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    ptx = compiled.asm["ptx"]
    needs["tensor_cores"] = bool(re.search(r"wgmma\.mma_async|mma\.sync", ptx))
    file = Path(sys.argv[1]) / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert registers is not None, text.stdout
    needs["registers"], needs["stack"] = map(int, registers.groups())
    return needs


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name} sm_{capability}": build(*job, capability)
                for capability in (80, 90)
                for name, job in jobs().items()
            }
        )
    )
