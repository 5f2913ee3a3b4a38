"""Full precision for what pruning computes, whatever precision the caller computes in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Switch autocast off inside, on the CPU and on this machine's accelerator. Also a decorator.

    Autocast would silently compute float32 products in half precision: scores and distances are
    differences of nearly equal numbers, so other tokens would be kept.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if its type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
