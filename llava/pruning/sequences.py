"""What the language model reads of one image, `TokenSequence`, and of one `Prompt`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.pruning.layout import NEWLINE


class TokenSequence(NamedTuple):
    """The tokens of one image in the order in which the language model reads them.

    Attributes:
        source: LongTensor [n]: tile * K + slot, counting the image's own tiles and their K slots in
            `projected`; NEWLINE for a newline. Not to be changed: calls share it.
        place: LongTensor [n], ascending: the position of each in the unpruned sequence; None for
            merged tokens, which have none.
        total: length of the unpruned sequence.
        patch_place: LongTensor [tiles * N], only of merged tokens: the position of every patch in
            the unpruned sequence, of no meaning for padding; None where every patch has its own
            number.
    """

    source: Tensor
    place: Tensor | None
    total: int
    patch_place: Tensor | None = None

    def keep(self, place: Tensor, slots: Tensor, width: int) -> TokenSequence:
        """Return what is left of an unpruned sequence.

        Args:
            place: LongTensor [n], ascending, which tokens are kept.
            slots: LongTensor [tiles, N], the new slot of every patch that is kept.
            width: the new number of slots of a tile.
        """
        source = self.source[place]
        patch = source.clamp(min=0)
        moved = patch // slots.shape[1] * width + slots.flatten()[patch]
        return TokenSequence(moved.masked_fill(source == NEWLINE, NEWLINE), place, self.total)

    def mean_coordinates(self, sources: Tensor, coordinates: Tensor) -> Tensor:
        """Average the coordinates of the patches that every merged token was made of.

        Args:
            sources: BoolTensor [tiles, K, N] of the image's own tiles, see `PrunedTokens.sources`.
            coordinates: LongTensor [A, total] of the unpruned sequence.

        Returns:
            LongTensor [A, n], rounded half up; of a token without a source (a class token) the mean
            of the whole image.
        """
        tiles, width, patches = sources.shape
        source = self.source.to(coordinates.device)
        made_of = sources.to(coordinates.device).flatten(0, 1)[source]
        if self.patch_place is None:
            of_patches = coordinates[:, : tiles * patches]
        else:
            of_patches = coordinates[:, self.patch_place.to(coordinates.device)]
        # Integer sums are exact everywhere: no device rounds them, none lacks the type.
        sums = [
            torch.where(made_of, axis[source // width], 0).sum(dim=1)
            for axis in of_patches.unflatten(1, (tiles, patches))
        ]
        counts = made_of.sum(dim=1)
        lone = counts == 0
        total = torch.where(lone, coordinates.sum(dim=1, keepdim=True), torch.stack(sums))
        counts = counts.masked_fill(lone, self.total)
        return (2 * total + counts).div(2 * counts, rounding_mode="floor")


class Prompt(NamedTuple):
    """The images of one prompt, its tokens of text, and how long it may be with all of them."""

    images: tuple[int, ...]
    text: int
    limit: int

    @property
    def room(self) -> int:
        """Visual tokens that fit next to the text; at least one for each image."""
        return max(self.limit - self.text, len(self.images))
