"""Checks of values that lie on an accelerator, made without waiting for them.

The host may only look at such a value once the device has computed it. Inside `collecting` a check
of a tensor on an accelerator is kept; `LateChecks.settle` makes all of them at a point where the
host waits anyway. On the CPU, and outside such a block, a check is made at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from llava.utils import UserInputError


class Check(NamedTuple):
    """Something that must not be: `bad` computes whether it is, `explain` says what to do."""

    bad: Callable[[], Tensor]
    explain: Callable[[], UserInputError]


class LateChecks(list[Check]):
    """Checks that were not made yet."""

    def settle(self) -> None:
        """Make the checks, all at once, for which the host waits; drop them if none found anything.

        Raises:
            UserInputError: of the first check that found something, also when called again.
        """
        checks = [*self]
        if not checks:
            return
        flags = [check.bad().any() for check in checks]
        first = flags[0].device
        flags = [flag if flag.device == first else flag.to(first) for flag in flags]
        found = torch.stack(flags).tolist()
        for check, bad in zip(checks, found, strict=True):
            if bad:
                raise check.explain()
        self.clear()


_collected: ContextVar[LateChecks | None] = ContextVar("late checks", default=None)


@contextmanager
def collecting() -> Iterator[LateChecks]:
    """Keep the checks of tensors on accelerators that are asked for inside."""
    checks = LateChecks()
    token = _collected.set(checks)
    try:
        yield checks
    finally:
        _collected.reset(token)


def refuse_if(
    device: torch.device, bad: Callable[[], Tensor], explain: Callable[[], UserInputError]
) -> None:
    """Raise `explain()` if any of `bad()` is true: at once, or in `settle` of the block around.

    Args:
        device: where the values lie.
        bad: makes a BoolTensor of any shape. What it holds is kept until it is called.
        explain: makes the error.
    """
    checks = _collected.get()
    if checks is not None and device.type != "cpu":
        checks.append(Check(bad, explain))
    elif bad().any():
        raise explain()
