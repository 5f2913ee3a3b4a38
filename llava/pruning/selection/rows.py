"""The result of a selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Picks(NamedTuple):
    """Chosen tokens: `indices` LongTensor [T, K], pick order, -1 padded; `margins` [T, K].

    A margin is the score of the token picked minus the best score passed over at that step, `inf`
    where there was no choice. What is picked at once (top-k) is ascending and has one margin.
    """

    indices: Tensor
    margins: Tensor


def no_choice(rows: int, width: int, device: torch.device) -> Tensor:
    """[rows, width] float32 margins of picks that had no choice: `inf`."""
    return torch.full((rows, width), torch.inf, dtype=torch.float32, device=device)


def joined(rows: list[Picks]) -> Picks:
    """Picks of single rows, indices [k] and margins [k], as one batch."""
    indices = pad_sequence([row.indices for row in rows], batch_first=True, padding_value=-1)
    margins = [row.margins for row in rows]
    return Picks(indices, pad_sequence(margins, batch_first=True, padding_value=torch.inf))


def unscored(rows: list[Tensor]) -> Picks:
    """Picks from one LongTensor of indices per tile, for methods that rank nothing."""
    indices = pad_sequence(rows, batch_first=True, padding_value=-1)
    return Picks(indices, no_choice(indices.shape[0], indices.shape[1], indices.device))
