"""Where the visual tokens of a batch stand in its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llava.pruning.layout import ImageLayout

TEXT, PADDING = -1, -2


@dataclass(frozen=True)
class PlacedImage:
    """What is known of an image whose tokens stand in a prompt.

    Attributes:
        total: its tokens, had nothing been pruned.
        layout: how they lie in the image; None where that is not known.
    """

    total: int
    layout: ImageLayout | None = None


@dataclass(frozen=True, eq=False)
class VisualColumns:
    """The columns of a batch of prompts as the language model reads them, on the CPU.

    Attributes:
        image: LongTensor [B, L]: the number of the image that a column belongs to, TEXT or PADDING.
        place: LongTensor [B, L]: the place of a visual token in the unpruned sequence of its image,
            ascending; 0 for others.
        images: the images of the batch.
    """

    image: Tensor
    place: Tensor
    images: tuple[PlacedImage, ...]

    @classmethod
    def of_rows(
        cls, rows: Sequence[tuple[Tensor, Tensor]], images: Sequence[PlacedImage], side: str
    ) -> VisualColumns:
        """Pad rows of (image, place), each LongTensor [L], on `side` ("left" or "right")."""
        width = max((len(image) for image, _ in rows), default=0)
        numbers = torch.full((len(rows), width), PADDING)
        places = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (image, place) in enumerate(rows):
            start = width - len(image) if side == "left" else 0
            numbers[row, start : start + len(image)] = image
            places[row, start : start + len(image)] = place
        return cls(numbers, places, tuple(images))

    @property
    def mask(self) -> Tensor:
        """BoolTensor [B, L], False for padding."""
        return self.image != PADDING

    @property
    def width(self) -> int:
        """L."""
        return self.image.shape[1]

    @cached_property
    def counts(self) -> list[int]:
        """Visual tokens of every image."""
        own = self.image[self.image >= 0]
        counts: list[int] = torch.bincount(own, minlength=len(self.images)).tolist()
        return counts

    @cached_property
    def rows(self) -> list[int]:
        """The row of every image; 0 for one without a token."""
        rows = [0] * len(self.images)
        for row, own in enumerate(self.image):
            for image in own[own >= 0].unique().tolist():
                rows[image] = row
        return rows

    @cached_property
    def text(self) -> list[int]:
        """Tokens of text of every row."""
        counts: list[int] = (self.image == TEXT).sum(dim=1).tolist()
        return counts

    def repeated(self, times: int) -> VisualColumns:
        """Return every row `times` times, each with images of its own."""
        if times == 1:
            return self
        count = len(self.images)
        own = self.image.repeat_interleave(times, 0)
        copy = torch.arange(len(own))[:, None] % times * count
        number = torch.where(own >= 0, own + copy, own)
        return VisualColumns(number, self.place.repeat_interleave(times, 0), self.images * times)

    def row(self, number: int, start: int = 0) -> VisualColumns:
        """Return row `number` alone from column `start` on, its images numbered from 0."""
        own = self.image[number : number + 1, start:]
        images = own[own >= 0].unique()
        numbers = torch.where(own >= 0, torch.searchsorted(images, own.clamp(min=0)), own)
        kept = tuple(self.images[image] for image in images.tolist())
        return replace(
            self, image=numbers, place=self.place[number : number + 1, start:], images=kept
        )
