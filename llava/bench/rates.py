"""What the machine can do: the rate of its matrix products and of its memory."""

import time
from collections.abc import Callable

import torch

from llava.bench.counts import type_name

# Rows, inner and outer width of a product, and bytes that are moved, by kind of device.
PRODUCT = {"cpu": (576, 4096, 4096), "cuda": (8192, 8192, 8192)}
_BYTES = {"cpu": 2**28, "cuda": 2**31}
_CALLS = 4


def measure_rates(device: torch.device, dtypes: set[torch.dtype]) -> dict[str, float]:
    """Return operations per second of a product by type, and bytes per second as `memory`.

    The best of several calls of one shape, `PRODUCT`, whose operands may lie in a cache. Other
    shapes may reach more or less. Memory is the faster of reading and copying.
    """
    kind = device.type if device.type in PRODUCT else "cpu"
    rates = {
        type_name(dtype): _product_rate(device, dtype, kind) for dtype in sorted(dtypes, key=str)
    }
    data = torch.ones(_BYTES[kind] // 4, device=device)
    copy = torch.empty_like(data)
    size = data.numel() * data.element_size()
    reading = size / fastest(lambda: data.sum(), device)
    copying = 2 * size / fastest(lambda: copy.copy_(data), device)
    return {**rates, "memory": max(reading, copying)}


def _product_rate(device: torch.device, dtype: torch.dtype, kind: str) -> float:
    rows, inner, outer = PRODUCT[kind]
    a = torch.randn(rows, inner, device=device, dtype=dtype)  # ones would draw less power
    b = torch.randn(outer, inner, device=device, dtype=dtype)
    return 2 * rows * inner * outer / fastest(lambda: torch.nn.functional.linear(a, b), device)


def fastest(call: Callable[[], object], device: torch.device, calls: int = _CALLS) -> float:
    """Return the seconds of the fastest of several calls, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(calls):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        best = min(best, time.perf_counter() - start)
    return best


def finish(device: torch.device) -> None:
    """Wait until an accelerator has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Clock:
    """Measures milliseconds since its creation or last lap, with all work of `device` done."""

    def __init__(self, device: torch.device) -> None:
        finish(device)
        self._device, self._start = device, time.perf_counter()

    def lap(self) -> float:
        """Return the milliseconds since the previous lap, and start the next one."""
        finish(self._device)
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return 1000 * elapsed
