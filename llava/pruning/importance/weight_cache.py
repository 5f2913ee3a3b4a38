"""Cache what is computed from a module's weights, until the weights change."""

from collections.abc import Callable, Hashable
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.late_checks import refuse_if
from llava.pruning.precision import outside_autocast

Value = TypeVar("Value")


class _Entry(NamedTuple):
    """A cached value, and the weights that it was computed from: see `_state` and `_checksums`."""

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
        state = _state(module)
        with self._lock:  # a WeakKeyDictionary is not made for several threads
            known = self._entries.setdefault(module, {}).get(key)
        if known is not None and known.state == state and not _changed_here(module, known):
            _check_elsewhere(module, known)
            return cast(Value, known.value)
        with outside_autocast(), torch.inference_mode(False), torch.no_grad():
            entry = _Entry(state, _checksums(module), compute())
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


def _state(module: nn.Module) -> Hashable:
    """Return what changes when a parameter is assigned, moved or written to, except by `.data`."""
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device, p.shape)
        for p in module.parameters()
    )


def _checksums(module: nn.Module) -> list[Tensor]:
    """Return the sum of every parameter's bits, read as integers: int64 scalars on its device."""
    return [_checksum(parameter.detach()) for parameter in module.parameters()]


def _checksum(weight: Tensor) -> Tensor:
    """Add up the bits of a tensor, read as integers that are as wide as its layout allows."""
    words = weight.contiguous().flatten()
    for kind in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if words.numel() * words.element_size() % kind.itemsize == 0:
            break
    # Integers wrap around, so the sum does not depend on its order; int64 is summed fastest.
    return words.view(kind).sum(dtype=torch.int64)


def _changed_here(module: nn.Module, known: _Entry) -> bool:
    """Return whether the checksum of a parameter on the CPU differs from the cached one."""
    return any(
        parameter.device.type == "cpu" and not torch.equal(_checksum(parameter.detach()), before)
        for parameter, before in zip(module.parameters(), known.checksums, strict=True)
    )


def _check_elsewhere(module: nn.Module, known: _Entry) -> None:
    """Refuse weights on an accelerator whose checksum differs from the cached one."""
    pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for parameter, before in zip(module.parameters(), known.checksums, strict=True):
        if parameter.device.type != "cpu":
            pairs.setdefault(parameter.device, []).append((parameter.detach(), before))

    def differ(of_device: list[tuple[Tensor, Tensor]]) -> Tensor:
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
