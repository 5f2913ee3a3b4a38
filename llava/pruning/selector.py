"""Choosing among the tokens of a batch: scored once, chosen from as often as asked."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE
from llava.pruning.selection.rows import no_choice
from llava.pruning.tokens import VisualTokens, refuse_non_finite


class Selector:
    """Runs the method of `config` on the images that have something to choose.

    Everything a batch can keep has a flat id: tile * N + patch for its patches, and T * N + i for
    its newlines, image by image.

    Attributes:
        ids: LongTensor [n] per image: the ids of its unpruned sequence, in order.
        size: number of ids.
        margins: [rows, picks] of the last choice: a row is a tile, or with "global" an image.
    """

    def __init__(self, visual: VisualTokens, config: PruningConfig, images: list[int]) -> None:
        self.visual, self.config = visual, config
        self.ids, self.size = _flat_ids(visual)
        self.tiles = [tile for image in images for tile in visual.tiles_of(image)]
        self.score_seconds = self.select_seconds = 0.0
        self.margins = visual.projected.new_empty(0, 0)
        self._importance: Tensor | None = None
        self._scored = False

    def nothing(self) -> Tensor:
        """BoolTensor [size], all False."""
        return torch.zeros(self.size, dtype=torch.bool, device=self.visual.projected.device)

    def per_tile(self, counts: list[int]) -> Tensor:
        """BoolTensor [size]: `counts[t]` patches of every tile t, whole tiles without a choice."""
        visual = self.visual
        sizes = visual.tile_sizes()
        chosen = self.nothing()
        patches = chosen[: visual.projected.shape[0] * visual.projected.shape[1]]
        grid = patches.view(visual.projected.shape[:2])
        whole = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if k == n]
        grid[whole] = True if visual.valid is None else visual.valid[whole]
        work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
        width = max(counts, default=0)
        self.margins = no_choice(len(counts), width, grid.device)
        if work:
            importance = self._score()
            if importance is not None:
                importance = importance[[self.tiles.index(t) for t in work]]
            rows = torch.tensor(work, device=grid.device)
            picked = self._pick(visual.subset(work), importance, [counts[t] for t in work], rows)
            # One more column takes the padding of rows with fewer picks.
            mask = torch.zeros(len(work), grid.shape[1] + 1, dtype=torch.bool, device=grid.device)
            mask.scatter_(1, picked.masked_fill(picked < 0, grid.shape[1]), True)
            grid[rows] = mask[:, :-1]
        return chosen

    def globally(self, counts: list[int | None]) -> Tensor:
        """BoolTensor [size]: `counts[i]` tokens of image i at once; None chooses nothing there."""
        chosen = self.nothing()
        images = [i for i, count in enumerate(counts) if count is not None]
        rows, lookup, importance = self._image_rows(images)
        wanted = [count for count in counts if count is not None]
        self.margins = no_choice(len(counts), max(wanted, default=0), chosen.device)
        at = torch.tensor(images, device=chosen.device)
        picked = self._pick(rows, importance, wanted, at)
        real = picked >= 0
        chosen[lookup.gather(1, picked.clamp(min=0))[real]] = True
        return chosen

    def _score(self) -> Tensor | None:
        """[tiles, N] importance of the tiles in `self.tiles`; None if the method has none."""
        if not self._scored:
            visual = self.visual.subset(self.tiles)
            start = time.perf_counter()
            refuse_non_finite(visual)
            with torch.no_grad():
                self._importance = self.config.pruner.score(visual)
            self.score_seconds += time.perf_counter() - start
            self._scored = True
        return self._importance

    def _pick(
        self, rows: VisualTokens, importance: Tensor | None, counts: list[int], at: Tensor
    ) -> Tensor:
        """LongTensor [rows, K] of the method's picks; their margins go to rows `at`."""
        self._score()  # guards the tokens also where there is nothing to score
        start = time.perf_counter()
        with torch.no_grad():
            picks = self.config.pruner.checked_select(rows, importance, counts)
        self.select_seconds += time.perf_counter() - start
        self.margins[at, : picks.margins.shape[1]] = picks.margins.to(self.margins.dtype)
        return picks.indices

    def _image_rows(self, images: list[int]) -> tuple[VisualTokens, Tensor, Tensor | None]:
        """One row per image: its tokens in sequence order, their ids [I, L], their importance."""
        visual = self.visual
        importance = self._score()
        select_newlines = self.config.newline == "select"
        if select_newlines and importance is not None:
            raise PruningError(
                f"newline='select': {self.config.method!r} scores tokens, and a newline has no "
                "score; use newline='drop' or 'keep'"
            )
        if select_newlines and "features" in self.config.pruner.needs:
            raise PruningError(
                f"newline='select': {self.config.method!r} looks at tokens before the projector, "
                "and a newline has none; use newline='drop' or 'keep'"
            )
        patches = visual.projected.shape[0] * visual.projected.shape[1]
        rows = [
            self.ids[i] if select_newlines else self.ids[i][self.ids[i] < patches] for i in images
        ]
        lookup = pad_sequence(rows, batch_first=True, padding_value=-1)
        valid = lookup >= 0
        lookup = lookup.clamp(min=0)
        if importance is not None:
            flat = importance.new_zeros(visual.projected.shape[:2])
            flat[self.tiles] = importance
            importance = flat.flatten()[lookup]
        extras = dict(visual.extras)
        if "image_digest" in extras:
            digests = extras["image_digest"]
            extras["image_digest"] = [
                _joint_digest([digests[t] for t in visual.tiles_of(i)]) for i in images
            ]
        view = replace(
            visual,
            features=_with_newlines(visual.features, None, self.size)[lookup],
            projected=_with_newlines(visual.projected, visual.newline, self.size)[lookup],
            image_index=torch.tensor(images, device=visual.image_index.device),
            grid=(1, lookup.shape[1]),
            valid=valid,
            blank=None if visual.blank is None else _flat_blank(visual.blank, self.size)[lookup],
            extras=extras,
            layouts=None,
            prompts=(),
        )
        return view, lookup, importance


def _flat_ids(visual: VisualTokens) -> tuple[list[Tensor], int]:
    count = visual.projected.shape[1]
    size = visual.projected.shape[0] * count
    first, ids = 0, []
    for image in range(visual.num_images):
        source = visual.sequence(image).source
        layout = None if visual.layouts is None else visual.layouts[image]
        flat = source + first * count
        if layout is not None and layout.newline:
            newlines = source == NEWLINE
            flat = torch.where(newlines, size + newlines.cumsum(0) - 1, flat)
            size += layout.newline_rows[0]
        ids.append(flat)
        first += len(visual.tiles_of(image))
    return ids, size


def _with_newlines(tokens: Tensor, newline: Tensor | None, size: int) -> Tensor:
    """[size, C]: tokens [T, N, C] by flat id, newlines as given or zero."""
    flat = tokens.flatten(0, 1)
    extra = size - len(flat)
    if not extra:
        return flat
    line = flat.new_zeros(flat.shape[1]) if newline is None else newline.to(flat)
    return torch.cat([flat, line.expand(extra, -1)])


def _flat_blank(blank: Tensor, size: int) -> Tensor:
    """[size] by flat id; a newline is no padding."""
    flat = blank.flatten()
    return torch.cat([flat, flat.new_zeros(size - len(flat))])


def _joint_digest(digests: list[object]) -> int:
    data = "/".join(str(digest) for digest in digests).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
