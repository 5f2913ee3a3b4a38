"""What a decoder method's file imports: the base class, and what a method sees at a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

from llava.pruning.decoder.columns import PlacedImage, VisualColumns
from llava.pruning.decoder.layers import DecoderLayers, Rotary, attention_rows, take_columns
from llava.pruning.decoder.registry import register
from llava.pruning.decoder.schedule import Schedule
from llava.pruning.options import check_options, option
from llava.pruning.selection.rows import top_k

__all__ = ["DecoderMethod", "Made", "Schedule", "Stage", "option", "register"]


@dataclass(eq=False)
class Stage:
    """Prompts between two layers: what a method scores and selects from.

    The I images are those of the whole batch, each with up to N visual tokens left.

    Attributes:
        decoder: the layers.
        layer: the one that these are the inputs of.
        cuts: of every image, which cut of its own schedule is prepared, from 0; None where it loses
            nothing at this one, or none is prepared.
        hidden: [B, S, D], inputs of the layer.
        rotary: of all columns.
        valid: BoolTensor [B, S], False for padding.
        columns: LongTensor [I, N], the column of every visual token that is left, in raster order;
            0 where `present` is False.
        present: BoolTensor [I, N], False behind an image's last token.
        rows: LongTensor [I], the row of every image.
        text: BoolTensor [B, S], True for tokens of text.
        place: LongTensor [I, N], a token's place in the unpruned sequence of its image.
        counts: tokens of every image that are left.
        images: what is known of the images.
        memory: what `begin` returned.
    """

    decoder: DecoderLayers
    layer: int
    cuts: list[int | None]
    hidden: Tensor
    rotary: Rotary
    valid: Tensor
    columns: Tensor
    present: Tensor
    rows: Tensor
    text: Tensor
    place: Tensor
    counts: list[int]
    images: tuple[PlacedImage, ...]
    memory: Any = None

    @cached_property
    def last(self) -> Tensor:
        """LongTensor [B], the last column of every prompt."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (columns * self.valid).amax(dim=1)

    def attention(self, queries: Tensor | None = None) -> Tensor:
        """Return the attention of a few tokens in this layer.

        Args:
            queries: LongTensor [B, Q], their columns; by default the last of every prompt.

        Returns:
            Float32 [B, H, Q, S].
        """
        queries = self.last[:, None] if queries is None else queries
        return attention_rows(
            self.decoder, self.layer, self.hidden, self.rotary, self.valid, queries
        )

    def of_images(self, values: Tensor) -> Tensor:
        """Return what `values` [B, S, ...] say of the visual tokens: [I, N, ...]."""
        return take_columns(values[self.rows], self.columns)


@dataclass(frozen=True)
class Made:
    """Tokens made of those that a cut drops: they stand behind the image's kept ones.

    Attributes:
        hidden: [I, M, D].
        counts: how many each image has; the others are padding at the end.
    """

    hidden: Tensor
    counts: list[int]


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class DecoderMethod:
    """A method that drops visual tokens between layers; its fields are its options.

    `plan` says before which layers and how many stay. At every cut the method scores the tokens
    that are left (`score`) and the best stay (`select`), as many as planned; `make` may make new
    tokens of those that go. `register` makes the class a frozen dataclass.

    Flags, as those of `PruningMethod`:

        name, signal, paper, fidelity, query_aware: see `llava.pruning.method.PruningMethod`.
        scored_by: the layer whose attention `score` reads: "previous", the last one before the cut,
            or "next", the first one behind it.
        positions: what tokens are numbered by after a cut: "original", as before it, or "compact",
            without gaps. A property where an option decides.
        budgeted: whether a budget must be given; without one the published schedule counts.
        fixed_count: whether the plan says how many tokens are left.
    """

    name: ClassVar[str] = ""
    signal: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    query_aware: ClassVar[bool] = True
    fidelity: ClassVar[str] = "own"
    stage: ClassVar[str] = "decoder"
    scored_by: ClassVar[str] = "previous"
    positions: ClassVar[str] = "original"
    budgeted: ClassVar[bool] = False
    fixed_count: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def files(self) -> tuple[str, ...]:
        """Files that options name and that are read: their contents are part of a setting."""
        return ()

    def check_budget(self, given: bool) -> None:
        """Refuse a budget beside options that say the same, or options that need one.

        Raises:
            PruningError: names both.
        """

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        """Return the cuts of an image; their layers depend on `depth` and options alone.

        Args:
            tokens: of the image where it enters the language model.
            depth: layers of the language model.
            budget: mean over layers of the tokens a layer reads, below `tokens`; None for the
                published schedule.

        Raises:
            UnreachableBudgetError: the budget is below what the schedule can reach.
            PruningError: the model is too shallow.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def adapt(self, schedule: Schedule, columns: VisualColumns, image: int) -> Schedule:
        """Return the schedule of an image, of its plan and what is known of its tokens.

        Args:
            schedule: what `plan` gave.
            columns: of the batch, on the CPU, as `relabel` gave them.
            image: its number.
        """
        return schedule

    def relabel(self, columns: VisualColumns) -> VisualColumns:
        """Return the columns that count as visual; by default all that are."""
        return columns

    def begin(self, stage: Stage) -> Any:
        """Return what later cuts read of the prompts before layer 0, as `Stage.memory`."""
        return None

    def score(self, stage: Stage) -> Tensor:
        """Score every visual token: [I, N], higher stays longer.

        Args:
            stage: the inputs of the layer that `scored_by` names.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def select(self, stage: Stage, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """Pick the tokens that stay, by default those with the highest scores.

        Args:
            stage: the inputs of the layer behind the cut.
            scores: [I, N] of `score`.
            counts: how many of each image, at most `stage.counts`. Without `fixed_count` all that
                are left; then fewer may be picked.

        Returns:
            LongTensor [I, K] of indices into N, in any order, padded with -1.
        """
        return top_k(scores, torch.tensor(counts), valid=stage.present).indices

    def make(self, stage: Stage, scores: Tensor, kept: Tensor) -> Made | None:
        """Make tokens of those that are dropped; by default none.

        Args:
            stage, scores: as in `select`.
            kept: BoolTensor [I, N], True for tokens that stay.
        """
        return None


def attention_to_images(stage: Stage, queries: Tensor | None = None) -> Tensor:
    """Return the attention that visual tokens get: the mean over heads and queries, [I, N].

    Args:
        stage: see `Stage`.
        queries: LongTensor [B, Q]; by default the last column of every prompt.
    """
    return stage.of_images(stage.attention(queries).mean(dim=(1, 2)))
