"""What the vision side of a model computes during one call, read by hooks.

The hooks stand on the model as long as something prunes it (`attachment`); they look only at a
context variable, so calls of other threads and tasks pass them untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Reads block `index` of a tower before it runs, from its arguments.
ReadBlock = Callable[[int, nn.Module, tuple[Any, ...], Mapping[str, Any]], None]


@dataclass
class Capture:
    """What a call of the vision side leaves behind.

    Attributes:
        read_block: what is done before every block of the tower.
        projections: input and output of the projector, of every time it ran.
    """

    read_block: ReadBlock | None = None
    projections: list[tuple[Tensor, Tensor]] = field(default_factory=list)


_capture: ContextVar[Capture | None] = ContextVar("capture", default=None)


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """Let the hooks write into `capture` inside."""
    token = _capture.set(capture)
    try:
        yield
    finally:
        _capture.reset(token)


@torch.compiler.disable
def after_projector(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Note input and output of a projector: its forward hook."""
    capture = _capture.get()
    if capture is not None:
        capture.projections.append((args[0], output))


def before_block(index: int) -> Callable[..., None]:
    """Return what reads block `index` of a tower: its forward pre-hook."""

    # Without kwargs where another thread removes the hook at this moment: nothing is read then.
    @torch.compiler.disable
    def read(block: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        capture = _capture.get()
        if capture is not None and capture.read_block is not None and kwargs is not None:
            capture.read_block(index, block, args, kwargs)

    return read
