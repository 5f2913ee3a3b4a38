"""Cache what is computed from a module's weights, until the weights change."""

from collections.abc import Callable, Hashable
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.late_checks import refuse_if
from llava.pruning.precision import outside_autocast

Value = TypeVar("Value")


class _Entry(NamedTuple):
    """A cached value, and the weights that it was computed from: see `_state` and `_checksum`."""

    weights: tuple[ref[nn.Parameter], ...]
    state: Hashable
    checksums: list[Tensor]
    value: object


class WeightCache:
    """Values computed from a module's weights; forgotten when the weights or the module change."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()
        self._lock = Lock()
        _caches.add(self)

    def get(self, module: nn.Module, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return `compute()`, or its last result for this module, key and these weights.

        It runs outside autocast, without gradients, and gives no inference tensors. Weights that
        were written to through `.data` are noticed by a checksum: at once on the CPU, elsewhere by
        a late check, which does not wait for the device and forgets the module.
        """
        weights = [*module.parameters()]
        state = _state(weights)
        with self._lock:  # a WeakKeyDictionary is not made for several threads
            known = self._entries.setdefault(module, {}).get(key)
        if known is not None and _still_of(known, weights, state):
            _check_elsewhere(module, weights, known)
            return cast(Value, known.value)
        with outside_autocast(), torch.inference_mode(False), torch.no_grad():
            checksums = [_checksum(weight.detach()) for weight in weights]
            entry = _Entry(tuple(map(ref, weights)), state, checksums, compute())
        for device in {weight.device for weight in weights}:
            if device.type == "cuda":  # other threads may read it from other streams
                torch.cuda.current_stream(device).synchronize()
        with self._lock:
            self._entries.setdefault(module, {})[key] = entry
        return cast(Value, entry.value)

    def forget(self, module: nn.Module) -> None:
        """Drop all values of a module."""
        with self._lock:
            self._entries.pop(module, None)


_caches: WeakSet[WeightCache] = WeakSet()


def forget(projector: nn.Module) -> None:
    """Drop everything that was computed from a projector's weights.

    Only needed after its weights were written to through `.data` on an accelerator: there that
    cannot be noticed without waiting for the device.
    """
    for cache in list(_caches):
        cache.forget(projector)


def _state(weights: list[nn.Parameter]) -> Hashable:
    """Return what changes when a parameter is assigned, moved or written to, except by `.data`."""
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device, p.shape)
        for p in weights
    )


def _checksum(weight: Tensor) -> Tensor:
    """Add up the bits of a tensor, read as integers: an int64 scalar on its device.

    The integers are as wide as its layout allows.
    """
    words = weight.contiguous().flatten()
    size = words.element_size()
    for kind in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if all(n * size % kind.itemsize == 0 for n in (words.numel(), words.storage_offset())):
            break
    # Integers wrap around, so the sum does not depend on its order; int64 is summed fastest.
    return words.view(kind).sum(dtype=torch.int64)


def _still_of(known: _Entry, weights: list[nn.Parameter], state: Hashable) -> bool:
    """Return whether an entry is of these weights; of those on the CPU also by their checksums."""
    if known.state != state:
        return False
    return all(
        then() is now and (now.device.type != "cpu" or torch.equal(_checksum(now.detach()), before))
        for then, now, before in zip(known.weights, weights, known.checksums, strict=True)
    )


def _check_elsewhere(module: nn.Module, weights: list[nn.Parameter], known: _Entry) -> None:
    """Refuse weights on an accelerator whose checksum differs from the cached one."""
    pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for parameter, before in zip(weights, known.checksums, strict=True):
        if parameter.device.type != "cpu":
            pairs.setdefault(parameter.device, []).append((parameter.detach(), before))

    def differ(of_device: list[tuple[Tensor, Tensor]]) -> Tensor:
        if _state(weights) != known.state:  # changed in the open meanwhile: nothing can be told
            return torch.zeros(1, dtype=torch.bool)
        now, then = zip(*((_checksum(weight), before) for weight, before in of_device), strict=True)
        return torch.stack(now) != torch.stack(then)

    def explain() -> PruningError:
        forget(module)
        return PruningError(
            "the projector's weights were changed through .data after scores were computed with "
            "them; call llava.pruning.forget(projector) after such a change, and run again"
        )

    for device, of_device in pairs.items():
        refuse_if(device, partial(differ, of_device), explain)
