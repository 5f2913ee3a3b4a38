"""Inputs for kernels, the torch references without kernels, and float64 brute force."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.pruning.selection.max_min import cosine
from llava.pruning.selection.rows import Picks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows differ in what they keep: some, one, nothing, and more than is valid in the last one.
SIZES = {17: (17, 1, 0, 17), 64: (30, 1, 0, 64), 130: (20, 1, 0, 130)}


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let the package compute on the CPU as if there were no interpreter."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@dataclass(frozen=True)
class Case:
    """A batch of rows on the CPU: z [B, N, D], weights, score, valid [B, N] and counts [B]."""

    z: Tensor
    weights: Tensor | None
    score: Tensor
    valid: Tensor | None
    counts: Tensor
    combine: str = "multiply"

    @property
    def width(self) -> int:
        return int(self.counts.max())

    def cosines(self) -> Tensor:
        return torch.stack([cosine(row.clone()) for row in self.z])

    def row(self, row: int) -> Case:
        """Row `row` as a batch of its own."""
        one = slice(row, row + 1)
        return replace(
            self,
            z=self.z[one],
            weights=None if self.weights is None else self.weights[one],
            score=self.score[one],
            valid=None if self.valid is None else self.valid[one],
            counts=self.counts[one],
        )

    def room(self, row: int) -> int:
        """Picks that row `row` can have."""
        room = self.z.shape[1] if self.valid is None else int(self.valid[row].sum())
        return min(room, int(self.counts[row]))


def make_case(size: int, *, weighted: bool = True, masked: bool = True, combine="multiply") -> Case:
    """Random rows of `size` tokens with what SIZES says of their counts."""
    counts = torch.tensor(SIZES[size])
    generator = torch.Generator().manual_seed(size)
    shape = len(counts), size
    z = torch.randn(*shape, 12, generator=generator)
    score = torch.rand(shape, generator=generator)
    weights = torch.rand(shape, generator=generator) if weighted else None
    if weights is not None:
        weights[:, ::5] = 0
    valid = torch.rand(shape, generator=generator) > 0.3 if masked else None
    return Case(z, weights, score, valid, counts, combine)


def duplicates_and_ties() -> Case:
    """Five different tokens over and over, with two weights: nearly every pick is a tie."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 5, 12, generator=generator).repeat(1, 5, 1)
    weights = torch.tensor([0.5, 1.0]).repeat(25)[:25].expand(2, 25).clone()
    return Case(z, weights, weights, None, torch.tensor([25, 11]))


def on_device(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(DEVICE)


def to_cpu(picks: Picks) -> Picks:
    return Picks(picks.indices.cpu(), picks.margins.cpu())


def brute_force_max_min(case: Case, row: int) -> tuple[list[int], list[float]]:
    """Pick token by token in float64, with every distance to everything that is picked."""
    z = torch.nn.functional.normalize(case.z[row].double(), dim=-1)
    ones = torch.ones(len(z)) if case.combine == "multiply" else torch.zeros(len(z))
    weights = (ones if case.weights is None else case.weights[row]).double()
    free = [n for n in range(len(z)) if case.valid is None or case.valid[row, n]]
    picked: list[int] = []
    margins = []
    while len(picked) < case.room(row):
        scores = {}
        for n in free:
            if not picked:
                scores[n] = float(case.score[row, n])
                continue
            distance = min(min(max(1 - float(z[n] @ z[p]), 0), 2) for p in picked)
            weight = float(weights[n])
            scores[n] = weight * distance if case.combine == "multiply" else weight + distance
        best = max(scores.values())
        pick = min(n for n, score in scores.items() if score == best)
        others = [score for n, score in scores.items() if n != pick]
        margins.append(best - max(others, default=-torch.inf))
        picked.append(pick)
        free.remove(pick)
    return picked, margins


def brute_force_dpp(kernel: Tensor, free: list[int], count: int) -> tuple[list[int], list[float]]:
    """Pick token by token by determinants of L [N, N], float64."""
    picked: list[int] = []
    margins = []
    for _ in range(count):
        volume = torch.det(kernel[picked][:, picked]) if picked else torch.ones(())
        gains = {}
        for n in free:
            together = [*picked, n]
            gains[n] = float(torch.det(kernel[together][:, together]) / volume)
        best = max(gains, key=lambda n: (gains[n], -n))
        margins.append(gains[best] - max((g for n, g in gains.items() if n != best), default=-9e9))
        picked.append(best)
        free = [n for n in free if n != best]
    return picked, margins


def same_while_clear(got: list[int], want: list[int], margins: list[float]) -> int:
    """Assert that picks agree up to the first one that rounding may decide; return how many.

    Exact ties go to the lowest index.
    """
    near = [step for step, margin in enumerate(margins) if 0 < margin < 1e-5]
    clear = min([*near, len(margins)])
    assert got[:clear] == want[:clear]
    return clear
