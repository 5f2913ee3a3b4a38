"""A method at work on a batch, and the plain strategies: in every tile, and in whole images."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.allocation.budgets import tile_counts
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.finite import refuse_non_finite
from llava.pruning.indices import constant, raster_slots, tile_starts, true_places
from llava.pruning.layout import NEWLINE
from llava.pruning.selection.rows import Merged, Picks, no_choice
from llava.pruning.tokens import PrunedTokens, TokenSequence, VisualTokens
from llava.pruning.trace import PruningTrace


class Selection(NamedTuple):
    """What a batch keeps.

    Attributes:
        kept: LongTensor [T, Kmax], indices of the kept tokens of every tile, ascending, padded with
            -1.
        padded: False where no tile is padded.
        sequences: what is left of every image's sequence; `source` counts the slots of `kept`.
        margins: [R, K] of the method's picks in every row; `inf` where there was no choice.
    """

    kept: Tensor
    padded: bool
    sequences: list[TokenSequence]
    margins: Tensor

    def places(self) -> list[Tensor]:
        """Return which tokens of each unpruned sequence are kept: BoolTensor [n] per image."""
        masks = []
        for sequence in self.sequences:
            place = sequence.place
            assert place is not None  # what selects keeps places
            mask = torch.zeros(sequence.total, dtype=torch.bool, device=place.device)
            masks.append(mask.index_fill(0, place, True))
        return masks


class MethodRun:
    """A method at work on one batch: it scores once, and selects as often as it is asked.

    Attributes:
        budgets: tokens that every image keeps; None for an image that stays as it is.
        score_seconds, select_seconds: time spent so far.
    """

    def __init__(
        self, visual: VisualTokens, config: PruningConfig, budgets: list[int | None]
    ) -> None:
        self.visual, self.config, self.budgets = visual, config, budgets
        self.score_seconds = self.select_seconds = 0.0

    @cached_property
    def sequences(self) -> list[TokenSequence]:
        """The unpruned sequence of every image."""
        return [self.visual.sequence(image) for image in range(self.visual.num_images)]

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
        if own is not None and len(tiles) < len(self.visual.projected):
            scores = own.new_zeros(self.visual.projected.shape[:2])
            scores.index_copy_(0, constant(tuple(tiles), own.device), own)
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

    def keep_places(self, places: Sequence[Tensor], margins: Tensor) -> Selection:
        """Keep the tokens at `places`, one BoolTensor [n] per image.

        Reads how many each tile has, for which the host waits.
        """
        patches = self.patches_at(places)
        kept, slots = raster_slots(patches), patches.cumsum(dim=1) - 1
        sequences = [
            sequence.keep(
                own.nonzero().flatten(), slots[self.visual.tiles_of(image)], kept.shape[1]
            )
            for image, (sequence, own) in enumerate(zip(self.sequences, places, strict=True))
        ]
        return Selection(kept, True, sequences, margins)

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
    visual, sizes = run.visual, run.visual.tile_sizes()
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    picks = None
    if work:
        scores = run.scores
        if scores is not None and len(work) < len(counts):
            scores = scores.index_select(0, constant(tuple(work), scores.device))
        picks = run.select(visual.subset(work), scores, [counts[tile] for tile in work])
    if picks is not None and len(work) == len(counts):
        kept, margins = picks
    else:
        rest = [0 if tile in work else count for tile, count in enumerate(counts)]
        kept, margins = whole_tiles(visual, rest, max(counts))
        if picks is not None:
            _fill_in(kept, margins, work, picks)
    sequences = [
        renumbered(run, image, kept.shape[1])
        if budget is None
        else _left_of(visual, image, kept, counts, total)
        for image, (budget, total) in enumerate(zip(budgets, visual.lengths(), strict=True))
    ]
    return Selection(kept, min(counts) < kept.shape[1], sequences, margins)


def whole_tiles(visual: VisualTokens, counts: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return what tiles keep whose counts[t] are all their tokens, or none, and their margins.

    Both are [T, width]: LongTensor, padded with -1; and `inf`, because nothing was chosen.
    """
    device = visual.projected.device
    kept = torch.full((len(counts), width), -1, dtype=torch.long, device=device)
    for tile, count in enumerate(counts):
        if count:
            own = visual.valid
            every = torch.arange(count, device=device)
            kept[tile, :count] = every if own is None else true_places(own[tile], count)
    return kept, no_choice(len(counts), width, device)


def _fill_in(kept: Tensor, margins: Tensor, tiles: list[int], picks: Picks) -> None:
    """Write the picks of some tiles into kept and margins [T, width] of all."""
    at = constant(tuple(tiles), kept.device)
    free = (0, kept.shape[1] - picks.indices.shape[1])
    kept.index_copy_(0, at, pad(picks.indices, free, value=-1))
    own = pad(picks.margins.to(margins.dtype), free, value=torch.inf)
    margins.index_copy_(0, at, own)


def _left_of(
    visual: VisualTokens, image: int, kept: Tensor, counts: list[int], total: int
) -> TokenSequence:
    """Return what kept [T, K] leaves of an image whose newlines go; tile t has counts[t]."""
    tiles = visual.tiles_of(image)
    own = slice(tiles[0], tiles[-1] + 1)
    width, count, device = kept.shape[1], visual.projected.shape[1], kept.device
    slots = filled_slots(tuple(counts[own]), width, device)
    patch = (kept[own] + tile_starts(len(tiles), count, device)).flatten()
    if len(slots) < len(patch):
        patch = patch[slots]
    place_of = places_of(visual, image, own)
    if place_of is None:
        return TokenSequence(slots, patch, total)
    place, order = place_of[patch].sort()
    return TokenSequence(slots[order], place, total)


def places_of(visual: VisualTokens, image: int, tiles: slice) -> Tensor | None:
    """Return the place of every patch of an image in its unpruned sequence, [tiles * N].

    None where every patch has its own number as its place.
    """
    if visual.layouts is not None:
        return visual.layouts[image].places_on(visual.projected.device)
    return None if visual.valid is None else visual.valid[tiles].flatten().cumsum(dim=0) - 1


@lru_cache(maxsize=256)
def filled_slots(counts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Return the slots of tiles with `counts` tokens in rows of `width`, flat: LongTensor [n]."""
    slots = (tile * width + slot for tile, count in enumerate(counts) for slot in range(count))
    return constant(tuple(slots), device)


def renumbered(run: MethodRun, image: int, width: int) -> TokenSequence:
    """Return the whole sequence of an image that keeps all tokens, in rows of `width` slots."""
    visual, sequence = run.visual, run.sequences[image]
    tiles = visual.tiles_of(image)
    slots = visual.valid_mask()[tiles[0] : tiles[-1] + 1].cumsum(dim=1) - 1
    everything = torch.arange(sequence.total, device=slots.device)
    return sequence.keep(everything, slots, width)


def select_in_images(run: MethodRun, budgets: list[int | None]) -> Selection:
    """Select among all tokens of an image at once: the `Strategy` of "global".

    How many a tile keeps depends on the tokens, so the host waits for that.
    """
    counts = {image: count for image, count in enumerate(budgets) if count is not None}
    if not counts:
        every = [torch.ones_like(s.source, dtype=torch.bool) for s in run.sequences]
        return run.keep_places(every, no_choice(len(budgets), 1, every[0].device))
    candidates = {image: _candidates(run, image) for image in counts}
    rows, scores = _image_rows(run, candidates)
    picks = run.select(rows, scores, list(counts.values()))
    places = [torch.ones_like(s.source, dtype=torch.bool) for s in run.sequences]
    for row, (image, count) in enumerate(counts.items()):
        places[image][:] = False
        places[image][candidates[image][picks.indices[row, :count]]] = True
    margins = no_choice(len(budgets), max(counts.values()), picks.margins.device)
    at = constant(tuple(counts), margins.device)
    margins[:, : picks.margins.shape[1]].index_copy_(0, at, picks.margins.to(margins.dtype))
    return run.keep_places(places, margins)


def _candidates(run: MethodRun, image: int) -> Tensor:
    """Return the places that the method selects among: LongTensor [L]."""
    source = run.sequences[image].source
    if run.config.newline == "select":
        return torch.arange(len(source), device=source.device)
    sizes = run.visual.tile_sizes()
    return true_places(source != NEWLINE, sum(sizes[tile] for tile in run.visual.tiles_of(image)))


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
        image_index=torch.tensor(list(candidates)),
        grid=(1, max(map(len, projected))),
        valid=pad_sequence(valid, batch_first=True),
        blank=None if visual.blank is None else stack(visual.blank),
        extras=extras,
        layouts=None,
        prompts=(),
        shares=(),
        sizes=tuple(map(len, projected)),
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
