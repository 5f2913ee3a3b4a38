"""A pass over whole prompts: visual tokens are dropped between its layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.pruning.decoder.columns import PADDING, TEXT, VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.layers import DecoderLayers, Rotary, take_columns
from llava.pruning.decoder.method import Made, Stage
from llava.pruning.decoder.schedule import Schedule
from llava.pruning.decoder.segments import Segment
from llava.pruning.decoder.trace import DecoderTrace, mark
from llava.pruning.indices import constant, raster_order
from llava.pruning.late_checks import LateChecks, collecting


@dataclass(eq=False)
class _Tokens:
    """What belongs to every column [B, S] of the prompts between two cuts."""

    image: Tensor
    place: Tensor
    columns: Tensor
    positions: Tensor

    def extended(self, width: int) -> _Tokens:
        """Return room for `width` more columns, padding for now."""
        return _Tokens(
            pad(self.image, (0, width), value=PADDING),
            pad(self.place, (0, width)),
            pad(self.columns, (0, width), value=-1),
            pad(self.positions, (0, width)),
        )


class Prefill:
    """Reads prompts once, see `before_layer`.

    Args:
        decoder: the layers.
        config: what is dropped.
        columns: where visual tokens stand.
        hidden: [B, L, D], inputs of layer 0; B is a multiple of the prompts where each is answered
            several times.
        inputs: other arguments of layer 0: `position_ids`, `position_embeddings` and
            `past_key_values`.

    Attributes:
        segments: the prompts between cuts, from the first layer on.
        cache: what the pass fills, or None.
        trace: what was done so far.

    Raises:
        UnreachableBudgetError: a budget below what the schedule can reach.
    """

    def __init__(
        self,
        decoder: DecoderLayers,
        config: DecoderConfig,
        columns: VisualColumns,
        hidden: Tensor,
        inputs: dict[str, Any],
    ) -> None:
        self.decoder, self.method = decoder, config.pruner
        times = len(hidden) // len(columns.image)
        self._own_images = len(columns.images)
        columns = self.method.relabel(columns).repeated(times)
        depth, device = len(decoder.layers), hidden.device
        self._columns, self._left = columns, [*columns.counts]
        plans = [
            config.plan(count, image.total, depth)
            for count, image in zip(columns.counts, columns.images, strict=True)
        ]
        self._plans = [self.method.adapt(plan, columns, i) for i, plan in enumerate(plans)]
        self._layers = self._cuts()
        image = columns.image.to(device, non_blocking=True)
        every = torch.arange(columns.width, device=device).expand_as(image)
        places = every.masked_fill(image == PADDING, -1)
        positions = inputs["position_ids"].expand(len(hidden), -1)
        place = columns.place.to(device, non_blocking=True)
        self._tokens = _Tokens(image, place, places, positions)
        self._rotary: Rotary = inputs["position_embeddings"]
        padded = bool((columns.image == PADDING).any())
        self.segments = [Segment(0, places, positions, None, padded)]
        self.cache = inputs.get("past_key_values")
        self._changed = [0] * len(hidden)
        self._inputs: dict[str, Any] | None = None
        self._scores: Tensor | None = None
        self._checks = LateChecks()
        self._memory: Any = None
        self.trace = DecoderTrace(config.method, depth, tuple(self._layers))

    def _cuts(self) -> list[int]:
        """Return the layers before which an image loses tokens, or gets others for them."""
        left, cuts = [*self._left], []
        for layer in sorted({layer for plan in self._plans for layer in plan.layers}):
            if not self.method.fixed_count:
                cuts.append(layer)
                continue
            after = [
                plan.left(plan.layers.index(layer)) if layer in plan.layers else own
                for plan, own in zip(self._plans, left, strict=True)
            ]
            made = any(plan.makes(layer) for plan in self._plans)
            if made or after != left:
                cuts.append(layer)
            left = after
        return cuts

    def before_layer(
        self, layer: int, hidden: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """Return what a layer gets instead of its hidden states and inputs; None for the same."""
        start = time.perf_counter()
        mark()
        with collecting() as checks:
            if layer == 0 and self._layers:
                self._memory = self.method.begin(self._stage(layer, hidden, cut=0))
            if layer in self._layers:
                hidden = self._cut(layer, hidden)
            if self.method.scored_by == "previous" and layer + 1 in self._layers:
                self._scores = self._score(layer, hidden, cut=layer + 1)
        self._checks += checks
        self.trace.per_layer.append([*self._left])
        mark()
        self.trace.seconds += time.perf_counter() - start
        return None if self._inputs is None else (hidden, {**inputs, **self._inputs})

    def finish(self, cache_bytes: int | None) -> DecoderTrace:
        """Make the checks that were left to this moment, and return the record of the pass.

        Args:
            cache_bytes: what its cache takes.

        Raises:
            UserInputError: a check found NaN.
        """
        self._checks.settle()
        # Where a prompt is answered several times, its images come again behind those of all.
        by_image = [[*counts] for counts in zip(*self.trace.per_layer, strict=True)]
        self.trace.per_layer = by_image[: self._own_images]
        self.trace.picks = [picks[: self._own_images] for picks in self.trace.picks]
        self.trace.cache_bytes = cache_bytes
        return self.trace

    def _stage(self, layer: int, hidden: Tensor, cut: int) -> Stage:
        """Return the prompts as a method sees them before a layer, to prepare a cut."""
        self._follow(hidden.device)
        rows = constant(tuple(self._columns.rows), hidden.device)
        own = self._tokens.image[rows]
        mine = own == torch.arange(len(rows), device=hidden.device)[:, None]
        width = max(self._left, default=0)
        columns = mine.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        counts = constant(tuple(self._left), hidden.device)
        present = torch.arange(width, device=hidden.device) < counts[:, None]
        columns = columns.masked_fill(~present, 0)
        return Stage(
            decoder=self.decoder,
            layer=layer,
            cuts=[plan.layers.index(cut) if cut in plan.layers else None for plan in self._plans],
            hidden=hidden,
            rotary=self._rotary,
            valid=self._tokens.columns >= 0,
            columns=columns,
            present=present,
            rows=rows,
            text=self._tokens.image == TEXT,
            place=self._tokens.place[rows].gather(1, columns),
            counts=[*self._left],
            images=self._columns.images,
            memory=self._memory,
        )

    def _follow(self, device: torch.device) -> None:
        """Go to the device of the layer that comes, where layers lie on several."""
        if self._tokens.image.device != device:
            parts = (getattr(self._tokens, field.name) for field in fields(self._tokens))
            self._tokens = _Tokens(*(part.to(device) for part in parts))
            self._rotary = self._rotary[0].to(device), self._rotary[1].to(device)

    @torch.no_grad()
    def _score(self, layer: int, hidden: Tensor, cut: int) -> Tensor:
        stage = self._stage(layer, hidden, cut)
        scores = self.method.score(stage)
        return scores.masked_fill(~stage.present, -torch.inf)

    def _cut(self, layer: int, hidden: Tensor) -> Tensor:
        """Drop tokens before a layer; return what is left of its inputs."""
        stage = self._stage(layer, hidden, cut=layer)
        scores = self._scores
        scores = self._score(layer, hidden, layer) if scores is None else scores.to(hidden.device)
        self._scores = None
        asked = [
            self._asked(plan, layer, left)
            for plan, left in zip(self._plans, self._left, strict=True)
        ]
        with torch.no_grad():
            picks = raster_order(self.method.select(stage, scores, asked))
        kept = torch.zeros_like(stage.present)
        kept = pad(kept, (0, 1)).scatter(1, picks.where(picks >= 0, kept.shape[1]), True)[:, :-1]
        made = self.method.make(stage, scores, kept)
        if not self.method.fixed_count:
            asked = kept.sum(dim=1).tolist()
        counts = [0] * len(asked) if made is None else made.counts
        for row, left, count, new in zip(
            self._columns.rows, self._left, asked, counts, strict=True
        ):
            if count != left or new:
                self._changed[row] = 1
        self._left = [count + new for count, new in zip(asked, counts, strict=True)]
        self.trace.picks.append(picks)
        return self._gather(layer, hidden, stage, kept, made)

    def _asked(self, plan: Schedule, layer: int, left: int) -> int:
        if layer not in plan.layers or plan.keep is None:
            return left
        return min(left, plan.keep[plan.layers.index(layer)])

    def _gather(
        self, layer: int, hidden: Tensor, stage: Stage, kept: Tensor, made: Made | None
    ) -> Tensor:
        """Put the tokens that stay together, on the left of padding where rows differ."""
        tokens, rows = self._tokens, stage.rows
        keep = tokens.image == TEXT
        at = rows[:, None] * keep.shape[1] + stage.columns
        at = at.where(kept, keep.numel())
        keep = pad(keep.flatten(), (0, 1)).scatter(0, at.flatten(), True)[:-1].view_as(keep)
        every = torch.arange(keep.shape[1], device=hidden.device)
        order = torch.where(keep, 2 * every, -1)
        if made is not None:
            hidden, tokens, order = self._with_made(hidden, order, stage, made)
        lengths = [*self._columns.text]
        for row, count in zip(self._columns.rows, self._left, strict=True):
            lengths[row] += count
        width = max(lengths)
        order, columns = (part[:, -width:] for part in order.sort(dim=1, stable=True))
        valid = order >= 0
        self._tokens = _Tokens(
            tokens.image.gather(1, columns).masked_fill(~valid, PADDING),
            tokens.place.gather(1, columns),
            tokens.columns.gather(1, columns).masked_fill(~valid, -1),
            tokens.positions.gather(1, columns),
        )
        hidden = take_columns(hidden, columns)
        self._number(layer, hidden, columns, valid, padded=min(lengths) < width)
        return hidden

    def _with_made(
        self, hidden: Tensor, order: Tensor, stage: Stage, made: Made
    ) -> tuple[Tensor, _Tokens, Tensor]:
        """Add tokens that were made, each behind its image's last token."""
        blocks = [0] * len(hidden)
        starts = []
        for row, count in zip(self._columns.rows, made.counts, strict=True):
            starts.append(blocks[row])
            blocks[row] += count
        width, first = max(blocks), hidden.shape[1]
        hidden = pad(hidden, (0, 0, 0, width))
        order, tokens = pad(order, (0, width), value=-1), self._tokens.extended(width)
        for image, (start, count) in enumerate(zip(starts, made.counts, strict=True)):
            if not count:
                continue
            row, own = self._columns.rows[image], slice(first + start, first + start + count)
            # One number as a tensor [1]: as a scalar index the host would wait for it.
            last = stage.columns[image, stage.counts[image] - 1 : stage.counts[image]]
            hidden[row, own] = made.hidden[image, :count].to(hidden)
            order[row, own] = 2 * last + 1
            tokens.image[row, own] = image
            for values in (tokens.columns, tokens.place, tokens.positions):
                values[row, own] = values[row].index_select(0, last)
        return hidden, tokens, order

    def _number(
        self, layer: int, hidden: Tensor, columns: Tensor, valid: Tensor, padded: bool
    ) -> None:
        """Number what is left, and begin its segment."""
        tokens, shift = self._tokens, None
        if self.method.positions == "compact":
            own = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
            # Rows that lost nothing yet keep their numbers, as they do alone.
            changed = constant(tuple(self._changed), hidden.device)[:, None].bool()
            own = torch.where(changed, own, tokens.positions)
            before = self.segments[0]
            last = before.positions.masked_fill(~before.valid, 0).amax(dim=1)
            shift = last.to(own.device) - own[:, -1]
            tokens.positions = own
            self._rotary = self.decoder.rotary(hidden, own)
        else:
            cos, sin = self._rotary
            self._rotary = take_columns(cos, columns), take_columns(sin, columns)
        segment = Segment(layer, tokens.columns, tokens.positions, shift, padded)
        self.segments.append(segment)
        mask = self.decoder.attention_mask(hidden, valid if padded else None, 0)
        self._inputs = {
            "attention_mask": mask,
            "position_embeddings": self._rotary,
            "position_ids": None,
        }
