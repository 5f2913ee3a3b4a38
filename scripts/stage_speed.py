"""What pruning costs at the size of LLaVA-1.5-7B: `python scripts/stage_speed.py OUT.json`.

Random features and projector weights at real widths (Dv 1024, D 4096, N 576), so times mean
something and tokens do not. For every method that needs nothing of the tower: milliseconds of the
whole stage (score, select, gather), median and 5th to 95th percentile, and how often the host waits
for the device. Uses the GPU if there is one.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.eval.engine import provenance
from llava.pruning import PruningConfig, VisualTokens, prune_visual_tokens
from llava.storage import dump_json, write_atomically

METHODS = ("random", "norm", "least-sensitive", "divprune", "zoo-exact", "zoo")
BUDGETS = (64, 128, 192)
TILED_BUDGETS = (160, 320, 640)


def tokens(tiles: int, device: str, dtype: torch.dtype) -> VisualTokens:
    """One image of `tiles` tiles of 576 tokens."""
    generator = torch.Generator().manual_seed(0)
    projector = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    projector = projector.to(device, dtype)
    features = torch.randn(tiles, 576, 1024, generator=generator).to(device, dtype)
    with torch.no_grad():
        projected = projector(features)
    return VisualTokens(
        features,
        projected,
        projector,
        torch.zeros(tiles, dtype=torch.long),
        (24, 24),
        extras={"image_digest": list(range(tiles))},
    )


def waits(call: Callable[[], Any]) -> int | None:
    """How often `call` makes the host wait for the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def milliseconds(call: Callable[[], Any], device: str, seconds: float) -> list[float]:
    """Sorted times of repeated calls, each with all its work finished."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    call()
    times: list[float] = []
    end = now() + 1000 * seconds
    while len(times) < 5 or (now() < end and len(times) < 200):
        start = now()
        call()
        times.append(now() - start)
    return sorted(times)


def measure(device: str, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for tiles, budgets in ((1, BUDGETS), (5, TILED_BUDGETS)):
        visual = tokens(tiles, device, dtype)
        for name in METHODS:
            for keep in budgets:
                call = partial(prune_visual_tokens, visual, PruningConfig(name, keep_tokens=keep))
                first = time.perf_counter()
                call()
                first = 1000 * (time.perf_counter() - first)
                times = milliseconds(call, device, seconds)
                rows.append(
                    {
                        "method": name,
                        "tokens": tiles * 576,
                        "keep": keep,
                        "dtype": str(dtype).removeprefix("torch."),
                        "first_ms": round(first, 3),
                        "median_ms": round(statistics.median(times), 4),
                        "p5_ms": round(times[len(times) // 20], 4),
                        "p95_ms": round(times[-1 - len(times) // 20], 4),
                        "calls": len(times),
                        "waits": waits(call),
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--commit", help="of this source, where git cannot tell")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        rows = measure(device, torch.bfloat16, args.seconds)
    result = {
        "command": f"python scripts/stage_speed.py --seconds {args.seconds:g}",
        "commit": {"commit": args.commit, "dirty": None} if args.commit else provenance.git_state(),
        "versions": provenance.package_versions(),
        "machine": provenance.machine(device),
        "rows": rows,
    }
    write_atomically(args.output, dump_json(result))


if __name__ == "__main__":
    main()
