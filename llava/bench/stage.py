"""The pruning stage alone, on random tokens of real widths."""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from llava.bench.rates import finish
from llava.pruning import PruningConfig, VisualTokens, prune_visual_tokens

METHODS = ("random", "norm", "least-sensitive", "divprune", "zoo-exact", "zoo")
# Methods that are captured in a CUDA graph, what matters most first. `random` draws on the host.
CAPTURED = ("zoo-exact", "divprune", "zoo", "least-sensitive", "norm")
# Tiles of an image, tokens of a tile, budgets.
IMAGES = ((1, 576, (64, 128, 192)), (5, 576, (160, 320, 640)))
MOST_CALLS = 200


def random_tokens(
    images: int,
    tiles: int,
    count: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> VisualTokens:
    """Make `images` images of `tiles` tiles of `count` tokens; features have a quarter of `width`.

    Features and weights of the projector are random, so times mean something and tokens do not.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images * tiles, count, width // 4, generator=generator)
    projector = nn.Sequential(
        nn.Linear(width // 4, width), nn.GELU(), nn.Linear(width, width)
    ).requires_grad_(False)
    for parameter in projector.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    projector = projector.to(device, dtype)
    features = features.to(device, dtype)
    with torch.no_grad():
        projected = projector(features)
        hidden = projector[0](features)
    side = round(count**0.5)
    return VisualTokens(
        features,
        projected,
        projector,
        torch.arange(images).repeat_interleave(tiles),
        (side, side) if side * side == count else (1, count),
        extras={"image_digest": list(range(images * tiles)), "projector_hidden": list(hidden)},
    )


def repeat(
    call: Callable[[], Any], device: torch.device, seconds: float, least: int
) -> list[float]:
    """Return ms of repeated calls, each with all its work finished.

    Args:
        call: what is timed; it should have run before.
        device: that does the work.
        seconds: after which no more call begins.
        least: calls that are made however long they take.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < MOST_CALLS):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        times.append(1000 * (time.perf_counter() - start))
    return times


def waits(call: Callable[[], Any], device: torch.device) -> int | None:
    """Count how often `call` makes the host wait for a GPU; None on another device."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Turning the mode on has a warning of its own, once a process.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def stage_calls(
    device: torch.device, dtype: torch.dtype, width: int
) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
    """Return a call of the stage for every method of `METHODS`, image and budget, and its name.

    The name is what its row begins with: method, tokens, keep, dtype.
    """
    calls: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for tiles, count, budgets in IMAGES:
        visual = random_tokens(1, tiles, count, width, device, dtype)
        for method in METHODS:
            for keep in budgets:
                name = {
                    "method": method,
                    "tokens": tiles * count,
                    "keep": keep,
                    "dtype": str(dtype).removeprefix("torch."),
                }
                config = PruningConfig(method, keep_tokens=keep)
                calls.append((name, partial(prune_visual_tokens, visual, config)))
    return calls


@torch.inference_mode()
def time_call(call: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """Time a call: first, median, percentiles (ms), waits, and on CUDA bytes beyond its inputs."""
    start = time.perf_counter()
    call()
    finish(device)
    first = 1000 * (time.perf_counter() - start)
    times = sorted(repeat(call, device, seconds, least=5))
    row: dict[str, Any] = {
        "first_ms": round(first, 3),
        "median_ms": round(statistics.median(times), 4),
        "p5_ms": round(times[len(times) // 20], 4),
        "p95_ms": round(times[-1 - len(times) // 20], 4),
        "calls": len(times),
        "waits": waits(call, device),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        finish(device)
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return row


@torch.inference_mode()
def time_graph(call: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """Capture a call in a CUDA graph and time its replays (ms), or say why it cannot be captured.

    To be run after all other measurements: a capture that fails may leave the device unusable.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        times = repeat(graph.replay, device, seconds, least=5)
    except RuntimeError as error:  # the stage waits, or copies from the host
        return {"graph_ms": None, "graph_error": f"{error}".partition("\n")[0]}
    return {"graph_ms": round(statistics.median(times), 4)}
