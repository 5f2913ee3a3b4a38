"""What a selection gets, `Rows`, what comes of it, `Picks` or `Merged`, and plain top-k."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.errors import PruningError
from llava.pruning.indices import constant, gather_slots, raster_order, true_places
from llava.pruning.late_checks import refuse_if
from llava.pruning.tokens import VisualTokens


class Picks(NamedTuple):
    """Selected tokens: `indices` LongTensor [R, K], pick order, -1 padded; `margins` [R, K].

    A margin is the score of the token picked minus the best score passed over at that step, `inf`
    where there was no choice. What is picked at once (top-k) is ascending and has one margin.
    """

    indices: Tensor
    margins: Tensor

    @classmethod
    def stack(cls, rows: "Sequence[Picks | Tensor]") -> "Picks":
        """Join rows to one batch: picks of single rows, or indices [k] that were not ranked."""
        picks = [
            row if isinstance(row, Picks) else cls(row, no_choice(1, len(row), row.device)[0])
            for row in rows
        ]
        indices, margins = zip(*picks, strict=True)
        return cls(
            pad_sequence(list(indices), batch_first=True, padding_value=-1),
            pad_sequence(list(margins), batch_first=True, padding_value=torch.inf),
        )


class Merged(NamedTuple):
    """New tokens: `projected` [T, K, D], zero padded; `sources` BoolTensor [T, K, N].

    A token that is none of the N, such as the class token, has no source. `places` LongTensor
    [T, K] says where outputs of crops (LLaVA-1.6) go in the sequence: to the place of that patch of
    their tile, or after all those, first -1, then -2, tile by tile. Base views, and everything
    without `places`, are read in the order of K. `counts` are the tokens of every tile; None where
    they are as many as asked for.
    """

    projected: Tensor
    sources: Tensor
    places: Tensor | None = None
    counts: list[int] | None = None

    @classmethod
    def stack(cls, tiles: Sequence[tuple[Tensor, ...]]) -> "Merged":
        """Join (projected [K, D], sources [K, N]) or (projected, sources, places [K]) of tiles."""
        projected, sources, *places = (list(part) for part in zip(*tiles, strict=True))
        return cls(
            pad_sequence(projected, batch_first=True),
            pad_sequence(sources, batch_first=True),
            pad_sequence(places[0], batch_first=True, padding_value=-1) if places else None,
            [len(tokens) for tokens in projected],
        )

    @classmethod
    def as_picked(
        cls, tokens: VisualTokens, picks: Tensor, counts: list[int] | None = None
    ) -> "Merged":
        """Emit tokens in the order of LongTensor picks [T, K], -1 padded, repeats included.

        For options that reproduce what no set of tokens in raster order can: such methods then
        merge. Without `counts`, how many picks a tile has, the host waits to learn them.
        """
        every = torch.arange(tokens.projected.shape[1], device=picks.device)
        if counts is None:
            counts = (picks >= 0).sum(dim=1).tolist()
        made = gather_slots(tokens.projected, picks)
        return cls(made, picks[..., None] == every, counts=counts)


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
        room = self.room
        for row, count in enumerate(self.counts.tolist()):
            yield row, count, selectable(self.z, self.valid, row, room[row])

    @property
    def room(self) -> list[int]:
        """Valid tokens of every row, known on the host."""
        return self.tokens.tile_sizes()

    @property
    def scored(self) -> Tensor:
        """`scores`; PruningError where the method gave none."""
        if self.scores is None:
            raise PruningError("a method that selects by scores must define score()")
        return self.scores

    def highest(self) -> Picks:
        """Pick the tokens with the highest scores of every row."""
        return top_k(self.scored, self.counts, valid=self.valid)


def selectable(z: Tensor, valid: Tensor | None, row: int, room: int | None = None) -> Tensor:
    """Return the indices of a row's valid tokens, LongTensor [n].

    Args:
        z: [R, N, ...].
        valid: BoolTensor [R, N]; None for all.
        row: which row.
        room: how many tokens are valid; without it the host waits to learn that.
    """
    if valid is None:
        return torch.arange(z.shape[1], device=z.device)
    return valid[row].nonzero()[:, 0] if room is None else true_places(valid[row], room)


def check_counts(k: int | Tensor, rows: Tensor, valid: Tensor | None) -> list[int]:
    """Return `k` as one int per row of `rows` [B, N, ...]; PruningError for more than is valid.

    Where `valid` lies on an accelerator it is not read: of rows with too few valid tokens, padding
    is picked.
    """
    batch, total = rows.shape[:2]
    counts = [int(c) for c in k.tolist()] if isinstance(k, Tensor) else [int(k)] * batch
    if len(counts) != batch:
        raise PruningError(f"k has {len(counts)} entries for {batch} rows")
    known = valid is not None and valid.device.type == "cpu"
    room = valid.sum(dim=1).tolist() if valid is not None and known else [total] * batch
    for row, (count, limit) in enumerate(zip(counts, room, strict=True)):
        if not 0 <= count <= limit:
            raise PruningError(f"cannot pick {count} of the {limit} valid tokens of row {row}")
    return counts


def check_rows(
    z: Tensor, k: int | Tensor, valid: Tensor | None, **values: Tensor | None
) -> list[int]:
    """Return `k` as one int per row of z [B, N, D]; PruningError for wrong shapes and counts.

    Args:
        z, k, valid: what a selection gets.
        values: what else it has for every token, [B, N], by name.
    """
    if z.dim() != 3:
        raise PruningError(f"z must be [B, N, D], got {list(z.shape)}")
    for name, value in {**values, "valid": valid}.items():
        if value is not None and value.shape != z.shape[:2]:
            raise PruningError(f"{name} must be {list(z.shape[:2])}, got {list(value.shape)}")
    return check_counts(k, z, valid)


def no_choice(rows: int, width: int, device: torch.device) -> Tensor:
    """Return [rows, width] float32 margins of picks that had no choice: `inf`."""
    return torch.full((rows, width), torch.inf, dtype=torch.float32, device=device)


def top_k(scores: Tensor, k: int | Tensor, *, valid: Tensor | None = None) -> Picks:
    """Pick the k highest scores of every row, ties to the lowest index.

    Args:
        scores: [B, N] floating point.
        k: one count, or LongTensor [B].
        valid: BoolTensor [B, N]; False is never picked.

    Returns:
        Indices LongTensor [B, max k] ascending, as all are picked at once, padded with -1; margins
        [B, max k]: in a row always the lowest score picked minus the highest left out.

    Raises:
        PruningError: a score is NaN, or k is above the number of valid tokens.
    """
    counts = check_counts(k, scores, valid)
    width = max(counts, default=0)
    total = scores.shape[1]
    same = counts.count(width) == len(counts)
    if scores.device.type == "cpu" and valid is None and 0 < width < total and same:
        highest = scores.topk(width + 1, dim=1)[0]
        best_left = highest[:, width:]
        places = (scores > best_left).nonzero()
        # A tie at the edge leaves too few above it, and so does a NaN, which counts as highest.
        if len(places) == width * len(counts):
            margin = highest[:, width - 1 : width] - best_left
            return Picks(places[:, 1].view(-1, width), margin.expand(-1, width))
    return _top_k_of_any(scores, counts, valid)


def _top_k_of_any(scores: Tensor, counts: list[int], valid: Tensor | None) -> Picks:
    """Do `top_k` for ties, padding and a count for every row."""

    def bad() -> Tensor:
        return scores.isnan() if valid is None else scores.isnan() & valid

    refuse_if(
        scores.device, bad, lambda: PruningError("scores contain NaN; there is no highest one")
    )
    order = ranking(scores, valid)
    width = max(counts, default=0)
    slots = torch.arange(width, device=scores.device)
    edge = constant(tuple(counts), scores.device)[:, None]
    filled = slots < edge
    picked = raster_order(order[:, :width].masked_fill(~filled, -1))
    ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    ranked = torch.nn.functional.pad(ranked.gather(1, order), (1, 1), value=-torch.inf)
    lowest, best_left = ranked.gather(1, edge), ranked.gather(1, edge + 1)
    margin = torch.where(lowest == best_left, 0, lowest - best_left)
    margins = margin.expand(-1, width).masked_fill(~filled, torch.inf)
    return Picks(picked, margins)


def ranking(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return indices by descending score, ties to the lowest, invalid last: [B, N]."""
    ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    if valid is None:
        return order
    # Valid tokens of score -inf come before invalid ones.
    return order.gather(1, (~valid.gather(1, order)).byte().argsort(dim=1, stable=True))
