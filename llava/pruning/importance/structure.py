"""Find out what a module of any class computes, by running a small private copy of it once.

A name says little about a `forward`, so a form that the layers suggest counts only if a copy with
random weights gives what the form says. Modules that are built alike are asked once.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from llava.pruning.precision import outside_autocast

Value = TypeVar("Value")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What nn.Module itself keeps in an instance.
_OWN = frozenset(vars(nn.Module()))
_MOST_ANSWERS = 256


Hook = TypeVar("Hook", bound=Callable[..., object])


def reads_only(hook: Hook) -> Hook:
    """Mark a hook that changes neither inputs nor outputs: forms are recognised in spite of it."""
    hook.reads_only = True  # type: ignore[attr-defined]
    return hook


class Answers(Generic[Value]):
    """Remembers what was found out about modules, by how they are built and not by their weights.

    Two modules are built alike if their trees have the same names, classes, `forward` functions,
    shapes and plain attributes.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Value | None] = {}
        self._lock = Lock()

    def get(self, module: nn.Module, find: Callable[[], Value | None]) -> Value | None:
        """Return `find()`, or what it found for a module built alike; None if it has hooks.

        A module with hooks (other than `reads_only`) or a `forward` of its own may compute
        anything, and calling them could have effects. `find` runs outside autocast and without
        gradients.
        """
        key = _build_of(module)
        if key is None:
            return None
        with self._lock:
            if key in self._known:
                return self._known[key]
        with outside_autocast(), torch.inference_mode(False), torch.no_grad():
            found = find()
        with self._lock:
            if len(self._known) >= _MOST_ANSWERS:
                self._known.clear()
            self._known[key] = found
        return found


def _build_of(module: nn.Module) -> Hashable | None:
    """Return what `Answers` compares; None for hooks or a `forward` of an instance."""
    parts: list[Hashable] = []
    for name, child in module.named_modules(remove_duplicate=False):
        own = vars(child)
        if "forward" in own or any(_changing(own.get(hooks)) for hooks in _HOOKS):
            return None
        settings = tuple((key, _plain(value)) for key, value in own.items() if key not in _OWN)
        tensors = tuple(
            (key, None if tensor is None else (tensor.shape, tensor.dtype.is_floating_point))
            for held in (child._parameters, child._buffers)
            for key, tensor in cast(Mapping[str, Tensor | None], held).items()
        )
        parts.append((name, type(child), type(child).forward, settings, tensors))
    return tuple(parts)


def _changing(hooks: Mapping[int, object] | None) -> bool:
    # Other threads may add and remove some meanwhile.
    return any(not hasattr(hook, "reads_only") for hook in [*(hooks or {}).values()])


def without_readers(module: nn.Module) -> dict[int, object]:
    """Return a memo for `copy.deepcopy` that leaves out hooks that only read.

    Another thread may be adding or removing one, which must not disturb the copy.
    """
    held = [getattr(child, hooks) for child in module.modules() for hooks in _HOOKS]
    return {id(hooks): OrderedDict() for hooks in held if not _changing(hooks)}


def _plain(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def leaves(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module in the order of their registration, without Identity, Dropout.

    Layers are modules without children. A module that comes up twice is listed twice.
    """
    return [
        child
        for _, child in module.named_modules(remove_duplicate=False)
        if not child._modules and not isinstance(child, nn.Identity | nn.Dropout)
    ]


def small_copy(module: nn.Module, shapes: Mapping[int, tuple[int, ...]]) -> nn.Module:
    """Return a copy outside training with random float64 weights on the CPU.

    Args:
        module: any module; nothing of it is changed or shared.
        shapes: for some of its tensors, by `id`, the shape in the copy.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        shape = shapes.get(id(tensor), tuple(tensor.shape))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5

    memo = without_readers(module)
    for weight in module.parameters():
        memo[id(weight)] = nn.Parameter(draw(weight), requires_grad=False)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            memo[id(buffer)] = draw(buffer)
    return copy.deepcopy(module, memo).eval()
