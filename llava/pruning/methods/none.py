"""No pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava.pruning.method import PruningMethod
from llava.pruning.registry import register


@register
@dataclass(frozen=True)
class Unpruned(PruningMethod):
    """Keep everything: the unpruned model, bit for bit. The reference of every table."""

    name: ClassVar[str] = "none"
    signal: ClassVar[str] = "-"
    budgeted: ClassVar[bool] = False
    fidelity: ClassVar[str] = "golden"

    def num_kept(self, n: int, budget: int) -> int:
        return n
