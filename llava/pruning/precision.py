"""The precision that pruning computes in, whatever precision the caller computes in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import torch
from torch import Tensor

# How the largest products of scores are computed, see `product_precision`.
COMPUTE = ("auto", "float32", "split", "bf16")


def product_precision(compute: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the precision of a score's largest products, whose results are added in float32.

    Args:
        compute: "float32"; "bf16", both operands rounded to bfloat16; "split", the left operand as
            the sum of two bfloat16 parts, in two products; or "auto": "bf16" for 16-bit models on
            a device that multiplies bfloat16 faster than float32, otherwise "float32".
        dtype: of the model.
        device: that multiplies.

    Returns:
        "float32" (which stands for float64 in float64 models), "split" or "bf16".
    """
    if compute != "auto":
        return compute
    narrow = dtype in (torch.bfloat16, torch.float16)
    return "bf16" if narrow and multiplies_bf16_fast(device) else "float32"


@lru_cache(maxsize=16)
def multiplies_bf16_fast(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16 products: a CPU, or a CUDA GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
