"""Record of what one run of the pruning stage did, for logs, results and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.indices import stack_rows


@dataclass(frozen=True)
class PruningTrace:
    """Record of one `prune_visual_tokens` call over T tiles.

    Attributes:
        method: registered name of the method, with what it could not read on these tokens.
        kept: LongTensor [T, Kmax], kept token indices in raster order, padded with -1;
            None for methods that merge.
        margins: [T, Kmax] float, in **pick order**: score of the token picked minus the best
            score passed over at that step. `inf` where there was no choice (padding, tiles kept
            whole, methods that do not score). Two runs whose features differ by rounding can
            only part at a pick with a small margin.
        tokens_before, tokens_after: visual tokens of each image, without and with pruning.
        score_seconds, select_seconds: wall clock on the host (on an accelerator: the time to
            enqueue the work; `llava.eval` benchmarks synchronise around the stage).
    """

    method: str
    kept: Tensor | None
    margins: Tensor
    tokens_before: list[int]
    tokens_after: list[int]
    score_seconds: float
    select_seconds: float

    @classmethod
    def join(
        cls,
        traces: Sequence[PruningTrace],
        images: Sequence[tuple[int, int]],
        tiles: Sequence[tuple[int, int]],
    ) -> PruningTrace:
        """Put the traces of several calls together, seconds added up.

        Args:
            traces: of one method, all with indices or all of merged tokens, and all with margins
                of tiles or all of images.
            images: (trace, image) of every image in the order wanted.
            tiles: the same of every tile.
        """
        kept = [trace.kept for trace in traces if trace.kept is not None]
        margins = [trace.margins for trace in traces]
        by_tile = sum(map(len, margins)) == len(tiles)
        return cls(
            method=", ".join(dict.fromkeys(trace.method for trace in traces)),
            kept=stack_rows(kept, tiles, -1) if kept else None,
            margins=stack_rows(margins, tiles if by_tile else images, torch.inf),
            tokens_before=[traces[trace].tokens_before[image] for trace, image in images],
            tokens_after=[traces[trace].tokens_after[image] for trace, image in images],
            score_seconds=sum(trace.score_seconds for trace in traces),
            select_seconds=sum(trace.select_seconds for trace in traces),
        )

    @property
    def first_margin(self) -> Tensor:
        """[T] margin of each tile's first pick, `inf` where there was no choice."""
        return self._open_margins[:, 0]

    @property
    def last_margin(self) -> Tensor:
        """[T] margin of each tile's last pick that had a choice, `inf` where none had."""
        margins = self._open_margins
        steps = torch.arange(margins.shape[1], device=margins.device)
        last = torch.where(margins.isfinite(), steps, 0).amax(dim=1, keepdim=True)
        return margins.gather(1, last)[:, 0]

    @property
    def _open_margins(self) -> Tensor:
        """[T, Kmax + 1]: `margins`, then a step without a choice, so that there is a first one."""
        return nn.functional.pad(self.margins, (0, 1), value=torch.inf)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; a margin without a choice is None."""

        def plain(values: Tensor) -> list[float | None]:
            return [value if value < float("inf") else None for value in values.tolist()]

        kept = None if self.kept is None else self.kept.tolist()
        return {
            "method": self.method,
            "kept": None if kept is None else [[i for i in row if i >= 0] for row in kept],
            "first_margin": plain(self.first_margin),
            "last_margin": plain(self.last_margin),
            "tokens_before": list(self.tokens_before),
            "tokens_after": list(self.tokens_after),
            "score_seconds": self.score_seconds,
            "select_seconds": self.select_seconds,
        }
