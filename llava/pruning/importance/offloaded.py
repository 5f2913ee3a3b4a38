"""Projectors whose weights lie elsewhere until they run: accelerate's CPU and disk offload."""

import copy
from collections.abc import Iterator, Mapping
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llava.pruning.errors import PruningError
from llava.pruning.importance.projectors import JoinedMerger

# What accelerate puts on a module that it hooks.
_ADDED = ("forward", "_old_forward", "_hf_hook")

_loaded: WeakKeyDictionary[nn.Module, dict[torch.device, nn.Module]] = WeakKeyDictionary()
_lock = Lock()


def at_hand(projector: nn.Module, device: torch.device) -> nn.Module:
    """Return the projector, or a copy on `device` of one whose weights are offloaded.

    Offloaded weights are on the meta device except while their layer runs. The copy is made once
    and kept as long as the projector; the projector is unchanged.

    Raises:
        PruningError: weights have no data, and no hook knows where these are.
    """
    if device.type == "meta" or not any(p.is_meta for p in projector.parameters()):
        return projector
    if type(projector) is JoinedMerger:
        return JoinedMerger(at_hand(projector.merger, device), projector.groups)
    with _lock:
        copies = _loaded.setdefault(projector, {})
        if device not in copies:
            with torch.inference_mode(False), torch.no_grad():
                copies[device] = _load(projector, device)
        return copies[device]


def _load(projector: nn.Module, device: torch.device) -> nn.Module:
    memo: dict[int, object] = {}
    for layer in projector.modules():
        hook = vars(layer).get("_hf_hook")
        memo[id(hook)] = hook  # it holds the weights of the whole model
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is not None:
                value = _data(hook, name) if tensor.is_meta else tensor
                if value is None:
                    raise PruningError(
                        f"the projector's {name} has no data to score with; load the model with "
                        "its vision side on a device, or offloaded by device_map"
                    )
                value = value.detach().to(device, tensor.dtype)
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_weight else value
    loaded = copy.deepcopy(projector, memo)
    for layer in loaded.modules():
        if "_hf_hook" in vars(layer):
            for name in _ADDED:
                vars(layer).pop(name, None)
    return loaded


def _data(hook: object, name: str) -> Tensor | None:
    """Return the offloaded tensor `name` of a layer from its hook."""
    for single in _single_hooks(hook):
        weights = getattr(single, "weights_map", None)
        data: Tensor | None = weights.get(name) if isinstance(weights, Mapping) else None
        if data is not None:
            return data
    return None


def _single_hooks(hook: object) -> Iterator[object]:
    yield hook
    for inner in getattr(hook, "hooks", ()):
        yield from _single_hooks(inner)
