"""Guard on cost: operations and memory of scores, counted from torch's dispatcher, not timed."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llava.pruning import forget, sensitivity
from llava.pruning.importance.derivatives import QuickGELU
from llava.pruning.importance.sensitivity import CHUNK_BYTES
from llava.pruning.importance.triangular import ACCELERATOR_BLOCK, BLOCK, squared_norms
from llava.pruning.importance.two_layer import _differences, plan
from llava.pruning.late_checks import collecting

MIB = 2**20
# LLaVA-1.5-7B, a LLaVA-1.6 image of five tiles.
TILES, TOKENS, DV, WIDTH, DIRECTIONS = 5, 576, 1024, 4096, 64


class Memory(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):  # was there before, if it is not known
                self.known.add(value.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def projector(width: int, dv: int, device: str, dtype: torch.dtype) -> nn.Sequential:
    with torch.device(device):
        layers = nn.Linear(dv, width), nn.GELU(), nn.Linear(width, width)
    return nn.Sequential(*layers).to(dtype)


def peak_of(call: Callable[[], object]) -> int:
    with Memory() as memory:
        call()
    return memory.peak


def test_memory_is_counted() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first, second
        torch.zeros(1500).view(30, 50).add_(1)

    assert peak_of(call) == 2 * 4000
    x = torch.zeros(1000)
    assert peak_of(lambda: x.view(10, 100)) == 0


@pytest.mark.parametrize("compute", ["float32", "split", "bf16"])
@pytest.mark.parametrize("estimator", ["zeroth_order", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_at_full_size(estimator, compute, dtype) -> None:
    """On an accelerator, beyond inputs and what is computed once, whatever the number of tiles.

    64 MiB for `exact`. 256 MiB for `zeroth_order`, whose products are too small otherwise; that is
    used, and it is less than the unpruned prefill of one image takes (378 MiB).
    """
    module = projector(WIDTH, DV, "meta", dtype)
    x = torch.empty(TILES, TOKENS, DV, device="meta", dtype=dtype)
    hidden = [torch.empty(TOKENS, WIDTH, device="meta", dtype=dtype) for _ in range(TILES)]

    def call() -> None:
        with collecting():  # meta tensors count as an accelerator's
            sensitivity(module, x, estimator=estimator, compute=compute, hidden=hidden)

    call()  # what is computed once for a projector
    peak = peak_of(call)
    if estimator == "exact":
        assert peak <= 64 * MIB
    else:
        assert 128 * MIB < peak <= 256 * MIB


@pytest.mark.parametrize("compute", ["float32", "split", "bf16"])
@pytest.mark.parametrize("act", [nn.GELU(), QuickGELU()], ids=["gelu", "quick gelu"])
def test_memory_of_any_activation(act, compute) -> None:
    """An activation of several steps needs more beside the differences, and fits too."""
    module = projector(WIDTH, DV, "meta", torch.bfloat16)
    module[1] = act
    x = torch.empty(1, TOKENS, DV, device="meta", dtype=torch.bfloat16)

    def call() -> None:
        with collecting():
            sensitivity(module, x, compute=compute)

    call()
    assert peak_of(call) <= 256 * MIB


@pytest.mark.parametrize("compute", ["float32", "split", "bf16"])
def test_memory_of_cpu_chunks_at_full_size(compute) -> None:
    """A CPU takes at most 64 MiB; its chunks are planned here for tensors without data."""
    factor = torch.empty(WIDTH, WIDTH, device="meta")
    rows, piece = plan(torch.device("cpu"), factor, compute, CHUNK_BYTES)
    nudges = torch.empty(DIRECTIONS, WIDTH, device="meta")
    at = torch.empty(rows // DIRECTIONS, WIDTH, device="meta")
    operand = factor if compute == "float32" else factor.bfloat16()

    def call() -> None:
        moved = _differences(nn.GELU(), at, nudges, compute, None, piece)
        squared_norms(moved, operand, torch.float32, nudges)

    assert 10 * MIB < peak_of(call) <= 64 * MIB


@pytest.mark.parametrize("compute", ["float32", "bf16"])
@pytest.mark.parametrize("estimator", ["zeroth_order", "exact"])
def test_memory_on_the_cpu(estimator, compute) -> None:
    """Small tensors: nothing here grows with the number of tiles, or with tokens x directions."""
    module, tokens = projector(512, 64, "cpu", torch.bfloat16), 48
    peaks = []
    for tiles in (1, 4):
        x = torch.zeros(tiles, tokens, 64, dtype=torch.bfloat16)
        hidden = [*module[0](x).detach()]

        def call(x=x, hidden=hidden) -> None:
            sensitivity(module, x, estimator=estimator, compute=compute, hidden=hidden)

        call()
        peaks.append(peak_of(call))
    assert peaks[1] <= peaks[0] + 4 * 4 * tokens * 4
    assert peaks[0] <= 64 * MIB


def triangle(rows: int, width: int, block: int) -> int:
    """Multiplications of one vector with an upper triangular matrix in blocks of rows."""
    return sum((width - start) * min(block, rows - start) for start in range(0, rows, block))


@pytest.mark.parametrize("compute", ["float32", "split", "bf16"])
@pytest.mark.parametrize("given", [True, False], ids=["reused", "computed"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations(device, given, compute) -> None:
    """Products are those of the formulas, and once a projector is known nothing of it is redone."""
    width, dv, tokens, count = 1280, 48, 12, 8
    module = projector(width, dv, device, torch.float32)
    x = torch.zeros(2, tokens, dv, device=device)
    hidden = torch.zeros(2, tokens, width, device=device) if given else None

    def flops(estimator: str) -> int:
        with FlopCounterMode(display=False) as counter, collecting():
            sensitivity(
                module, x, estimator=estimator, directions=count, compute=compute, hidden=hidden
            )
        return counter.get_total_flops()

    products = 2 if compute == "split" else 1
    narrow = compute != "float32"
    first_layer = 0 if given else tokens * dv * width
    block = BLOCK if device == "cpu" else width
    exact = 2 * 2 * (products * tokens * triangle(width, width, block) + first_layer)
    block = BLOCK if device == "cpu" else ACCELERATOR_BLOCK
    once = count * dv * width + narrow * count * width * width
    each = products * tokens * count * triangle(width, width, block)
    zoo = 2 * (2 * (each + first_layer) + once)
    for estimator, want in (("exact", exact), ("zeroth_order", zoo)):
        first = flops(estimator)
        again = flops(estimator)
        vectors = narrow * 2 * 2 * tokens * width if estimator == "exact" else 0
        assert again in (want, want + vectors)
        if estimator == "exact":
            assert first > again  # the quadratic form was computed once
        forget(module)


def test_triangles_halve_the_work() -> None:
    assert triangle(4096, 4096, BLOCK) / 4096**2 == pytest.approx((1 + BLOCK / 4096) / 2)
