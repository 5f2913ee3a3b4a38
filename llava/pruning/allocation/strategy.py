"""What a strategy is, and the two that need no protocol: per tile, and in whole images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.allocation.budgets import tile_counts
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE
from llava.pruning.selection.rows import Merged, Picks, no_choice
from llava.pruning.tokens import PrunedTokens, TokenSequence, VisualTokens, refuse_non_finite
from llava.pruning.trace import PruningTrace


class Selection(NamedTuple):
    """What a batch keeps.

    Attributes:
        places: BoolTensor [n] per image: which tokens of its unpruned sequence are kept.
        margins: [R, K] of the method's picks in every row; `inf` where there was no choice.
    """

    places: list[Tensor]
    margins: Tensor


class Allocation(Protocol):
    """A strategy: in which rows a method selects, and how many tokens in each."""

    def select(self, budgets: list[int | None]) -> Selection:
        """Select `budgets[i]` tokens of every image i; None keeps all."""
        ...


class MethodRun:
    """A method at work on one batch: it scores once, and selects as often as it is asked.

    Attributes:
        sequences: the unpruned sequence of every image.
        score_seconds, select_seconds: time spent so far.
    """

    def __init__(self, visual: VisualTokens, config: PruningConfig) -> None:
        self.visual, self.config = visual, config
        self.sequences = [visual.sequence(image) for image in range(visual.num_images)]
        self.score_seconds = self.select_seconds = 0.0
        self._scores: Tensor | None = None
        self._is_scored = False

    def score(self, budgets: list[int | None]) -> Tensor | None:
        """Score the tiles of all images that have a budget, at the first call; zero elsewhere.

        Returns:
            [T, N], or None if the method does not score tokens.

        Raises:
            PruningError: a token is NaN or inf.
        """
        if not self._is_scored:
            pruned = [image for image, budget in enumerate(budgets) if budget is not None]
            tiles = [tile for image in pruned for tile in self.visual.tiles_of(image)]
            some = self.visual.subset(tiles)
            start = time.perf_counter()
            refuse_non_finite(some)
            with torch.no_grad():
                scores = self.config.pruner.score(some)
                if scores is not None:
                    self._scores = scores.new_zeros(self.visual.projected.shape[:2])
                    self._scores[tiles] = scores
            self.score_seconds += time.perf_counter() - start
            self._is_scored = True
        return self._scores

    def select(self, rows: VisualTokens, scores: Tensor | None, counts: list[int]) -> Picks:
        """Let the method select `counts[r]` tokens of every row r, in raster order."""
        start = time.perf_counter()
        with torch.no_grad():
            picks = self.config.pruner.checked_select(rows, scores, counts)
        self.select_seconds += time.perf_counter() - start
        return picks

    def merge(self, rows: VisualTokens, counts: list[int]) -> Merged:
        """Let the method make new tokens of every tile, at most `counts[t]`; keeps gradients.

        Raises:
            PruningError: a token is NaN or inf.
        """
        refuse_non_finite(rows)
        start = time.perf_counter()
        merged = self.config.pruner.merge(rows, torch.tensor(counts))
        self.select_seconds += time.perf_counter() - start
        return merged

    def patches_at(self, places: Sequence[Tensor]) -> Tensor:
        """BoolTensor [T, N]: the patches at `places`, one BoolTensor [n] per image."""
        count, blocks = self.visual.projected.shape[1], []
        for image, (sequence, kept) in enumerate(zip(self.sequences, places, strict=True)):
            # A newline is -1, the index of the element that is added and left out again.
            block = kept.new_zeros(len(self.visual.tiles_of(image)) * count + 1)
            block[sequence.source] = kept
            blocks.append(block[:-1].view(-1, count))
        return torch.cat(blocks)

    def result(
        self,
        projected: Tensor,
        valid: Tensor,
        sequences: list[TokenSequence],
        margins: Tensor,
        kept: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> PrunedTokens:
        """Put together what is left of the batch; see `PrunedTokens` and `PruningTrace`."""
        trace = PruningTrace(
            method=self.config.pruner.label(self.visual),
            kept=kept,
            margins=margins,
            tokens_before=[sequence.total for sequence in sequences],
            tokens_after=[len(sequence.source) for sequence in sequences],
            score_seconds=self.score_seconds,
            select_seconds=self.select_seconds,
        )
        return PrunedTokens(
            projected,
            valid,
            self.visual.image_index,
            tuple(sequences),
            trace,
            kept=kept,
            sources=sources,
            original_positions=self.config.positions == "original",
            layouts=self.visual.layouts,
            newline=self.visual.newline,
        )


@dataclass
class PerTile:
    """Share the budget of an image out among its tiles, and select in each of them."""

    run: MethodRun

    def count(self, budgets: list[int | None]) -> list[int]:
        """Count the patches that every tile keeps."""
        return tile_counts(self.run.visual, budgets)

    def select(self, budgets: list[int | None]) -> Selection:
        run, visual, counts = self.run, self.run.visual, self.count(budgets)
        sizes, device = visual.tile_sizes(), visual.projected.device
        patches = torch.zeros(visual.projected.shape[:2], dtype=torch.bool, device=device)
        whole = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if k == n]
        patches[whole] = visual.valid_mask()[whole]
        work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
        margins = no_choice(len(counts), max(counts), device)
        if work:
            at, scores = torch.tensor(work, device=device), run.score(budgets)
            picks = run.select(
                visual.subset(work),
                None if scores is None else scores[at],
                [counts[tile] for tile in work],
            )
            # One more column takes the -1 that rows with fewer picks are padded with.
            chosen = patches.new_zeros(len(work), patches.shape[1] + 1)
            patches[at] = chosen.scatter(1, picks.indices % chosen.shape[1], True)[:, :-1]
            margins[at, : picks.margins.shape[1]] = picks.margins.to(margins.dtype)
        places = [
            torch.ones_like(sequence.source, dtype=torch.bool)
            if budgets[image] is None
            else _line_up(patches[visual.tiles_of(image)], sequence.source)
            for image, sequence in enumerate(run.sequences)
        ]
        return Selection(places, margins)


@dataclass
class WholeImage:
    """Select among all tokens of an image at once (`allocation="global"`)."""

    run: MethodRun

    def select(self, budgets: list[int | None]) -> Selection:
        counts = {image: count for image, count in enumerate(budgets) if count is not None}
        candidates = {image: self._candidates(image) for image in counts}
        rows, scores = self._rows(candidates, self.run.score(budgets))
        picks = self.run.select(rows, scores, list(counts.values()))
        places = [torch.ones_like(s.source, dtype=torch.bool) for s in self.run.sequences]
        for row, (image, count) in enumerate(counts.items()):
            places[image][:] = False
            places[image][candidates[image][picks.indices[row, :count]]] = True
        margins = no_choice(len(budgets), max(counts.values()), picks.margins.device)
        margins[list(counts), : picks.margins.shape[1]] = picks.margins.to(margins.dtype)
        return Selection(places, margins)

    def _candidates(self, image: int) -> Tensor:
        """LongTensor [L]: the places that the method selects among."""
        source = self.run.sequences[image].source
        if self.run.config.newline == "select":
            return torch.arange(len(source), device=source.device)
        return (source != NEWLINE).nonzero().flatten()

    def _rows(
        self, candidates: dict[int, Tensor], scores: Tensor | None
    ) -> tuple[VisualTokens, Tensor | None]:
        """One row per image: its candidates in sequence order, and their scores [I, L]."""
        visual, config = self.run.visual, self.run.config
        if config.newline == "select" and scores is not None:
            raise PruningError(
                f"newline='select': {config.method!r} scores tokens, and a newline has no score; "
                "use newline='drop' or 'keep'"
            )
        if config.newline == "select" and "features" in config.pruner.needs:
            raise PruningError(
                f"newline='select': {config.method!r} looks at tokens before the projector, and a "
                "newline has none; use newline='drop' or 'keep'"
            )

        def stack(values: Tensor) -> Tensor:
            """Values [T, N, ...] of all tiles as [I, L, ...], padded with zeros."""
            return pad_sequence(
                [
                    _line_up(
                        values[visual.tiles_of(image)], self.run.sequences[image].source[places]
                    )
                    for image, places in candidates.items()
                ],
                batch_first=True,
            )

        projected = [visual.embeddings(image)[places] for image, places in candidates.items()]
        extras = dict(visual.extras)
        if "image_digest" in extras:
            extras["image_digest"] = [
                _joint_digest([extras["image_digest"][tile] for tile in visual.tiles_of(image)])
                for image in candidates
            ]
        valid = [torch.ones_like(places, dtype=torch.bool) for places in candidates.values()]
        rows = replace(
            visual,
            features=stack(visual.features),
            projected=pad_sequence(projected, batch_first=True),
            image_index=torch.tensor(list(candidates), device=visual.image_index.device),
            grid=(1, max(map(len, projected))),
            valid=pad_sequence(valid, batch_first=True),
            blank=None if visual.blank is None else stack(visual.blank),
            extras=extras,
            layouts=None,
            prompts=(),
        )
        return rows, None if scores is None else stack(scores)


def _line_up(values: Tensor, source: Tensor) -> Tensor:
    """[n, ...]: values [tiles, N, ...] of an image in the order of its sequence; newlines zero."""
    flat = values.flatten(0, 1)
    # A newline is -1, the index of the row that is added.
    return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[source]


def _joint_digest(digests: list[object]) -> int:
    data = "/".join(str(digest) for digest in digests).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
