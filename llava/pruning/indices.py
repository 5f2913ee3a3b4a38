"""Indices of tokens as tensors, made without reading values where counts are known."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad


def tile_starts(tiles: int, count: int, device: torch.device) -> Tensor:
    """Return the number of every tile's first token: LongTensor [tiles, 1]."""
    return constant(tuple(range(0, tiles * count, count)), device)[:, None]


def raster_slots(chosen: Tensor) -> Tensor:
    """Return the indices chosen in BoolTensor [T, N]: [T, K], ascending, padded with -1.

    Reads how many there are, for which the host waits.
    """
    every = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    return raster_order(every.masked_fill(~chosen, -1))[:, : int(chosen.sum(dim=1).max())]


def true_places(mask: Tensor, count: int) -> Tensor:
    """Return the flat places of the `count` true values of a BoolTensor: LongTensor [count]."""
    return torch.nonzero_static(mask.flatten(), size=count)[:, 0]


@lru_cache(maxsize=4096)
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return LongTensor [n] of `values`, not to be changed.

    It is copied to a device once, which the host waits for, so that any stream may read it.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.long).to(device)


def raster_order(indices: Tensor, padded: bool = True) -> Tensor:
    """Sort every row of LongTensor [R, K] ascending; the -1 padding stays at the end.

    Args:
        indices: of tokens.
        padded: False promises that there is no -1.
    """
    if not padded:
        return indices.sort(dim=1).values
    last = torch.iinfo(indices.dtype).max
    ordered = indices.masked_fill(indices < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def gather_slots(tokens: Tensor, kept: Tensor, padded: bool = True) -> Tensor:
    """Return tokens [T, N, D] at LongTensor kept [T, K], zero where that is -1: [T, K, D].

    Args:
        tokens: the tokens of every tile.
        kept: indices of each tile's own tokens.
        padded: False promises that `kept` has no -1.
    """
    at = (kept.clamp(min=0) if padded else kept) + tile_starts(
        tokens.shape[0], tokens.shape[1], kept.device
    )
    gathered = tokens.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, kept.shape)
    return gathered.masked_fill((kept < 0)[..., None], 0) if padded else gathered


def stack_rows(tensors: Sequence[Tensor], rows: Sequence[tuple[int, int]], fill: float) -> Tensor:
    """Return rows of several tensors, padded with `fill` to a common shape: [len(rows), ...].

    Args:
        tensors: [R_i, ...], all with as many dimensions.
        rows: (tensor, row) of each.
        fill: what padding holds.
    """
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        free = [most - size for most, size in zip(shape, tensor.shape[1:], strict=True)]
        ends = [end for room in reversed(free) for end in (0, room)]
        padded.append(pad(tensor, ends, value=fill))
    starts = [0, *accumulate(len(tensor) for tensor in tensors)]
    at = constant(tuple(starts[tensor] + row for tensor, row in rows), tensors[0].device)
    return torch.cat(padded).index_select(0, at)
