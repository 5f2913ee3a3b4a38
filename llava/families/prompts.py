"""From a prompt with all of its image tokens to the prompt with those that were kept.

All arithmetic of columns and positions is done on the CPU, where the ids are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.pruning.errors import PruningError
from llava.pruning.tokens import ImageTokens

# Arguments that have one entry for every token of the prompt, and what stands in their padding.
PER_TOKEN = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class ImageColumns(NamedTuple):
    """Where the tokens of one image, or one frame of a video, stand.

    Attributes:
        row: of the batch.
        columns: LongTensor [n], ascending.
        video: number of the video whose frames share their rows and columns of positions.
    """

    row: int
    columns: Tensor
    video: int | None = None

    @property
    def first(self) -> tuple[int, int]:
        """Row and column of its first token."""
        return self.row, int(self.columns[0])


@dataclass
class Prompts:
    """Prompts of a batch as their processor made them, on the CPU.

    Attributes:
        ids: LongTensor [B, L] with one placeholder for every token of an image.
        mask: BoolTensor [B, L], False for padding.
        images: where every image of the batch stands, row by row from left to right.
        positions: LongTensor [A, B, L] of the unpruned prompts: one axis, or M-RoPE's three.
    """

    ids: Tensor
    mask: Tensor
    images: list[ImageColumns]
    positions: Tensor

    def images_of(self, row: int) -> list[int]:
        """Return the numbers of the images of a row."""
        return [number for number, image in enumerate(self.images) if image.row == row]

    def blocks(self, row: int) -> list[Tensor]:
        """Return the columns of every image and every whole video of a row, in their order."""
        blocks: dict[Any, list[Tensor]] = {}
        for number in self.images_of(row):
            _, columns, video = self.images[number]
            blocks.setdefault(("image", number) if video is None else video, []).append(columns)
        return sorted((torch.cat(block) for block in blocks.values()), key=lambda own: int(own[0]))


@dataclass
class PrunedPrompts:
    """Prompts of a batch with the tokens that their images keep: which columns, at which places.

    Attributes:
        columns: LongTensor [B, L'] of the unpruned prompt, -1 for padding.
        positions: LongTensor [A, B, L'], 0 for padding.
        visual: BoolTensor [B, L'], True for the tokens of images, which come in their order.
    """

    columns: Tensor
    positions: Tensor
    visual: Tensor

    @property
    def mask(self) -> Tensor:
        """BoolTensor [B, L'], False for padding."""
        return self.columns >= 0

    @property
    def width(self) -> int:
        """L'."""
        return self.columns.shape[1]

    def repeated(self, times: int) -> PrunedPrompts:
        """Return every row `times` times."""
        return PrunedPrompts(
            self.columns.repeat_interleave(times, 0),
            self.positions.repeat_interleave(times, 1),
            self.visual.repeat_interleave(times, 0),
        )

    def take(self, values: Tensor, padding: Any) -> Tensor:
        """Return what is left of `values` [B, L]: [B, L'] on their device."""
        columns = self.columns.to(values.device)
        taken = values.gather(1, columns.clamp(min=0))
        return taken.masked_fill(columns < 0, padding)


def find_images(
    ids: Tensor, mask: Tensor, placeholders: Sequence[int], lengths: Sequence[int]
) -> list[ImageColumns]:
    """Find the columns of every image: rows take images in order until their placeholders are used.

    Args:
        ids, mask: [B, L] on the CPU.
        placeholders: ids of tokens that stand for an image.
        lengths: tokens of every image, in the order of the batch.

    Raises:
        PruningError: placeholders and images do not match.
    """
    marks = torch.isin(ids, torch.tensor(placeholders)) & mask
    images, number = [], 0
    for row, own in enumerate(marks):
        columns = own.nonzero().flatten()
        start = 0
        while start < len(columns) and number < len(lengths):
            part = columns[start : start + lengths[number]]
            if len(part) < lengths[number]:
                break
            images.append(ImageColumns(row, part))
            start += lengths[number]
            number += 1
        if start < len(columns):
            raise mismatch(int(marks.sum()), len(lengths), sum(lengths))
    if number < len(lengths):
        raise mismatch(int(marks.sum()), len(lengths), sum(lengths))
    return images


def find_runs(marks: Tensor) -> list[tuple[int, int]]:
    """Return start and length of every run of True in BoolTensor [L]."""
    edges = pad(marks.int(), (1, 1)).diff()
    starts, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def mismatch(marks: int, images: int, tokens: int) -> PruningError:
    """Return the error for prompts whose placeholders are not those of their images."""
    return PruningError(
        f"the prompts have {marks} image placeholders but the {images} images have "
        f"{tokens} tokens; make input_ids and pixels with one call of the model's processor"
    )


def text_positions(mask: Tensor) -> Tensor:
    """Number the tokens of every row that are not padding: LongTensor [1, B, L]."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[None]


def prune_prompts(prompts: Prompts, kept: ImageTokens | None, side: str) -> PrunedPrompts:
    """Leave out of every prompt the tokens that its images lost.

    With compact positions the gaps are closed. On one axis what is left is numbered 0, 1, 2, ...;
    on M-RoPE's axes each image or video has the extent of the rows and columns in which a token is
    left, and what follows moves up, as in the prompt of a smaller image. Times stay: they may
    count seconds.

    Args:
        prompts: the unpruned prompts.
        kept: what is left of their images; None for prompts without any.
        side: where rows are padded, "left" or "right".
    """
    axes = prompts.positions.shape[0]
    original = kept is not None and kept.original_positions
    rows = []
    for row in range(len(prompts.ids)):
        keep = prompts.mask[row].clone()
        visual = torch.zeros_like(keep)
        positions = prompts.positions[:, row].clone()
        for number in prompts.images_of(row):
            assert kept is not None
            columns = prompts.images[number].columns
            own = left_columns(kept, number, columns)
            keep[columns] = False
            keep[own] = visual[own] = True
            if axes > 1:
                positions[:, own] = kept.mean_place(number, positions[:, columns])
        if axes > 1 and not original:
            for columns in prompts.blocks(row):
                _close_gaps(positions, columns, columns[visual[columns]])
        left = keep.nonzero().flatten()
        if axes == 1 and len(left) and not original:
            positions[:, left] = positions[0, left[0]] + torch.arange(len(left))
        rows.append((left, positions, visual))
    width = max(len(columns) for columns, _, _ in rows)
    pruned = PrunedPrompts(
        torch.full((len(rows), width), -1),
        torch.zeros(axes, len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.bool),
    )
    for row, (columns, positions, visual) in enumerate(rows):
        at = slice(width - len(columns), width) if side == "left" else slice(0, len(columns))
        pruned.columns[row, at] = columns
        pruned.positions[:, row, at] = positions[:, columns]
        pruned.visual[row, at] = visual[columns]
    return pruned


def left_columns(kept: ImageTokens, number: int, columns: Tensor) -> Tensor:
    """Return the columns of the tokens left of an image; merged ones take its first."""
    left = kept.sequence(number)
    return columns[: len(left.source)] if left.place is None else columns[left.place.cpu()]


def _close_gaps(positions: Tensor, columns: Tensor, own: Tensor) -> None:
    """Close the gaps of an image in the positions [A, L] of a row, in place.

    Args:
        positions: of the whole row; those of `own` are already those of the tokens left.
        columns: of all the image's tokens.
        own: of the tokens that are left, some of `columns`.
    """
    after = int(columns[-1]) + 1
    start = int(positions[:, columns].min())
    extent = 0
    for axis in positions[1:]:
        # The rank of each among the places that are still taken.
        _, rank = axis[own].unique(return_inverse=True)
        axis[own] = start + rank
        extent = max(extent, int(rank.max()) + 1)
    if after < positions.shape[1]:
        shift = int(positions[:, after].min()) - start - extent
        positions[:, after:] -= max(shift, 0)
