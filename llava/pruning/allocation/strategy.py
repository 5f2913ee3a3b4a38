"""A method at work on a batch, and the plain strategies: in every tile, and in whole images."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

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


class MethodRun:
    """A method at work on one batch: it scores once, and selects as often as it is asked.

    Attributes:
        budgets: tokens that every image keeps; None for an image that stays as it is.
        sequences: the unpruned sequence of every image.
        score_seconds, select_seconds: time spent so far.
    """

    def __init__(
        self, visual: VisualTokens, config: PruningConfig, budgets: list[int | None]
    ) -> None:
        self.visual, self.config, self.budgets = visual, config, budgets
        self.sequences = [visual.sequence(image) for image in range(visual.num_images)]
        self.score_seconds = self.select_seconds = 0.0

    @cached_property
    def scores(self) -> Tensor | None:
        """[T, N] scores, zero in tiles of images without a budget; None if the method has none.

        Raises:
            PruningError: a token is NaN or inf.
        """
        pruned = [image for image, budget in enumerate(self.budgets) if budget is not None]
        tiles = [tile for image in pruned for tile in self.visual.tiles_of(image)]
        some = self.visual.subset(tiles)
        start = time.perf_counter()
        refuse_non_finite(some)
        with torch.no_grad():
            scores = own = self.config.pruner.score(some)
        if own is not None:
            scores = own.new_zeros(self.visual.projected.shape[:2])
            scores[tiles] = own
        self.score_seconds = time.perf_counter() - start
        return scores

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
        """Return the patches at `places`, one BoolTensor [n] per image: BoolTensor [T, N]."""
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


# Select `budgets[i]` tokens of every image i; None keeps all.
Strategy = Callable[[MethodRun, list[int | None]], Selection]


def select_in_tiles(run: MethodRun, budgets: list[int | None]) -> Selection:
    """Select in every tile its share of the image's budget: the `Strategy` of "per_tile"."""
    return select_counted(run, budgets, tile_counts(run.visual, budgets))


def select_counted(run: MethodRun, budgets: list[int | None], counts: list[int]) -> Selection:
    """Select `counts[t]` tokens in every tile t of the images that have a budget."""
    visual, sizes, device = run.visual, run.visual.tile_sizes(), run.visual.projected.device
    whole = [k == n for k, n in zip(counts, sizes, strict=True)]
    patches = visual.valid_mask() & torch.tensor(whole, device=device)[:, None]
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    margins = no_choice(len(counts), max(counts), device)
    if work:
        at, scores = torch.tensor(work, device=device), run.scores
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


def select_in_images(run: MethodRun, budgets: list[int | None]) -> Selection:
    """Select among all tokens of an image at once: the `Strategy` of "global"."""
    counts = {image: count for image, count in enumerate(budgets) if count is not None}
    candidates = {image: _candidates(run, image) for image in counts}
    rows, scores = _image_rows(run, candidates)
    picks = run.select(rows, scores, list(counts.values()))
    places = [torch.ones_like(s.source, dtype=torch.bool) for s in run.sequences]
    for row, (image, count) in enumerate(counts.items()):
        places[image][:] = False
        places[image][candidates[image][picks.indices[row, :count]]] = True
    margins = no_choice(len(budgets), max(counts.values()), picks.margins.device)
    margins[list(counts), : picks.margins.shape[1]] = picks.margins.to(margins.dtype)
    return Selection(places, margins)


def _candidates(run: MethodRun, image: int) -> Tensor:
    """Return the places that the method selects among: LongTensor [L]."""
    source = run.sequences[image].source
    if run.config.newline == "select":
        return torch.arange(len(source), device=source.device)
    return (source != NEWLINE).nonzero().flatten()


def _image_rows(
    run: MethodRun, candidates: dict[int, Tensor]
) -> tuple[VisualTokens, Tensor | None]:
    """Make one row per image: its candidates in sequence order, and their scores [I, L]."""
    visual, config, scores = run.visual, run.config, run.scores
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
        """Return values [T, N, ...] of all tiles as [I, L, ...], padded with zeros."""
        return pad_sequence(
            [
                _line_up(values[visual.tiles_of(image)], run.sequences[image].source[places])
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
    """Return values [tiles, N, ...] of an image in sequence order, newlines zero: [n, ...]."""
    flat = values.flatten(0, 1)
    # A newline is -1, the index of the row that is added.
    return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[source]


def _joint_digest(digests: list[object]) -> int:
    data = "/".join(str(digest) for digest in digests).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
