"""What a selection gets, `Rows`, and what comes of it: `Picks`, or `Merged` for new tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.errors import PruningError
from llava.pruning.tokens import VisualTokens


class Picks(NamedTuple):
    """Selected tokens: `indices` LongTensor [R, K], pick order, -1 padded; `margins` [R, K].

    A margin is the score of the token picked minus the best score passed over at that step, `inf`
    where there was no choice. What is picked at once (top-k) is ascending and has one margin.
    """

    indices: Tensor
    margins: Tensor


class Merged(NamedTuple):
    """New tokens: `projected` [T, K, D], zero padded; `sources` BoolTensor [T, K, N].

    A token that is none of the N, such as the class token, has no source. `places` LongTensor
    [T, K] says where outputs of crops (LLaVA-1.6) stand in the sequence: in the place of that patch
    of their tile, or after all those, first -1, then -2, tile by tile. Base views, and everything
    without `places`, are read in the order of K.
    """

    projected: Tensor
    sources: Tensor
    places: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """What is selected from: a row is a tile or, with allocation="global", an image.

    Attributes:
        tokens: the visual tokens of just these rows, for methods that read more than `z`.
        z: [R, N, C], the tokens that are compared with each other, see `PruningMethod.compared`.
        scores: [R, N], what `score` gave; None for a method that scores nothing.
        counts: LongTensor [R] on the CPU, picks of every row.
        valid: BoolTensor [R, N], False is never picked; None if everything is valid.
        weight: [R, N], multiplies what a token counts after the method's own normalisation; None
            for 1. Wrappers such as `cen-prune` set it.
    """

    tokens: VisualTokens
    z: Tensor
    scores: Tensor | None
    counts: Tensor
    valid: Tensor | None = None
    weight: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield row, count and LongTensor [n] of the valid tokens, row by row."""
        for row, count in enumerate(self.counts.tolist()):
            yield row, count, selectable(self.z, self.valid, row)

    @property
    def scored(self) -> Tensor:
        """`scores`; PruningError where the method gave none."""
        if self.scores is None:
            raise PruningError("a method that selects by scores must define score()")
        return self.scores


def selectable(z: Tensor, valid: Tensor | None, row: int) -> Tensor:
    """Return the indices of a row's valid tokens, LongTensor [n]; z is [R, N, ...]."""
    tokens = torch.arange(z.shape[1], device=z.device)
    return tokens if valid is None else tokens[valid[row]]


def check_counts(k: int | Tensor, rows: Tensor, valid: Tensor | None) -> list[int]:
    """Return `k` as one int per row of `rows` [B, N, ...]; PruningError for more than is valid."""
    batch, total = rows.shape[:2]
    counts = [int(c) for c in k.tolist()] if isinstance(k, Tensor) else [int(k)] * batch
    if len(counts) != batch:
        raise PruningError(f"k has {len(counts)} entries for {batch} rows")
    room = [total] * batch if valid is None else [int(n) for n in valid.sum(dim=1).tolist()]
    for row, (count, limit) in enumerate(zip(counts, room, strict=True)):
        if not 0 <= count <= limit:
            raise PruningError(f"cannot pick {count} of the {limit} valid tokens of row {row}")
    return counts


def raster_order(indices: Tensor) -> Tensor:
    """Sort every row of LongTensor [R, K] ascending; the -1 padding stays at the end."""
    last = torch.iinfo(indices.dtype).max
    ordered = indices.masked_fill(indices < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def no_choice(rows: int, width: int, device: torch.device) -> Tensor:
    """Return [rows, width] float32 margins of picks that had no choice: `inf`."""
    return torch.full((rows, width), torch.inf, dtype=torch.float32, device=device)


def stack_picks(rows: list[Picks]) -> Picks:
    """Join picks of single rows, indices [k] and margins [k], to one batch."""
    indices = pad_sequence([row.indices for row in rows], batch_first=True, padding_value=-1)
    margins = [row.margins for row in rows]
    return Picks(indices, pad_sequence(margins, batch_first=True, padding_value=torch.inf))


def stack_indices(rows: list[Tensor]) -> Picks:
    """Make picks without margins of one LongTensor [k] a row, for methods that rank nothing."""
    indices = pad_sequence(rows, batch_first=True, padding_value=-1)
    return Picks(indices, no_choice(indices.shape[0], indices.shape[1], indices.device))


def stack_merged(tiles: list[tuple[Tensor, Tensor, Tensor]]) -> Merged:
    """Join (projected [K, D], sources [K, N], places [K]) of every tile to one batch."""
    projected, sources, places = zip(*tiles, strict=True)
    return Merged(
        pad_sequence(list(projected), batch_first=True),
        pad_sequence(list(sources), batch_first=True),
        pad_sequence(list(places), batch_first=True, padding_value=-1),
    )


def emit_as_picked(tokens: VisualTokens, picks: Tensor) -> Merged:
    """Emit tokens in the order of LongTensor picks [T, K], repeats included.

    For options that reproduce what no set of tokens in raster order can: such methods then merge.
    """
    rows = picks.clamp(min=0)[..., None].expand(-1, -1, tokens.projected.shape[-1])
    projected = tokens.projected.gather(1, rows).masked_fill((picks < 0)[..., None], 0)
    every = torch.arange(tokens.projected.shape[1], device=picks.device)
    return Merged(projected, picks[..., None] == every)
